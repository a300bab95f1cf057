// Values of CR0, CR4 and EFER that long mode forbids. Apart from the other #GP checks because a
// processor that accepts one of these is lost.
// Intel SDM vol. 2, MOV to control registers; vol. 3, 2.5, 9.8.5.
#include "berth.inc"
    .text
    .globl main
main:
    // LMSW sets PE but cannot clear it (vol. 2, LMSW).
    smsw eax
    and eax, ~1
    lmsw ax
    mov rcx, cr0
    and ecx, 1
    CHECK "lmsw does not clear PE", rcx, 1
    // CR0.ET is read only as 1 on current processors.
    mov rax, cr0
    and eax, ~0x10
    mov cr0, rax
    mov rcx, cr0
    and ecx, 0x10
    CHECK "cr0.ET stays 1", rcx, 0x10
    // EFER.LMA cannot be written; LME not while paging is on.
    RDMSR64 MSR_EFER
    mov rbx, rax
    and eax, ~0x400
    wrmsr
    RDMSR64 MSR_EFER
    CHECK "efer.LMA is read only", rax, rbx
    // The upper halves are ignored or refused; PCID needs CR3[11:0] = 0.
    mov eax, 1
    cpuid
    bt ecx, 17
    jnc 1f
    mov rax, cr3
    or rax, 1
    mov cr3, rax
    mov rax, cr4
    bts rax, 17
    FAULT "mov cr4: PCIDE with CR3[11:0] not 0", GP, 0, mov cr4, rax
    mov rax, cr3
    and rax, ~1
    mov cr3, rax
    mov rax, cr4
    bts rax, 17
    mov cr4, rax
    // CR0.PG cannot be cleared with PCIDE set either; same #GP.
    mov rax, cr4
    btr rax, 17
    mov cr4, rax
    jmp 2f
1:  SKIP "mov cr4: PCIDE with CR3[11:0] not 0", "no PCID"
2:
    // Reserved bits.
    mov rbx, cr0
    mov rax, rbx
    bts rax, 29
    btr rax, 30
    FAULT "mov cr0: NW without CD", GP, 0, mov cr0, rax
    mov rax, rbx
    bts rax, 32
    FAULT "mov cr0: bit 32", GP, 0, mov cr0, rax
    mov rbx, cr4
    mov rax, rbx
    bts rax, 63
    FAULT "mov cr4: bit 63", GP, 0, mov cr4, rax
    mov rax, rbx
    bts rax, 19
    mov r8, rax
    mov eax, 7
    xor ecx, ecx
    cpuid
    mov rax, r8
    bt ecx, 23
    jc 1f
    FAULT "mov cr4: bit 19 (KL) not advertised", GP, 0, mov cr4, rax
    jmp 2f
1:  SKIP "mov cr4: bit 19 (KL) not advertised", "advertised"
2:  mov rax, cr3
    bts rax, 52
    FAULT "mov cr3: reserved bit 52", GP, 0, mov cr3, rax
    mov rbx, cr0
    mov rax, rbx
    btr rax, 0
    FAULT "mov cr0: PG without PE", GP, 0, mov cr0, rax
    mov rax, rbx
    btr rax, 31
    FAULT "mov cr0: clear PG in 64-bit mode", GP, 0, mov cr0, rax
    mov rcx, cr0
    CHECK "cr0 unchanged", rcx, rbx
    mov rbx, cr4
    mov rax, rbx
    btr rax, 5
    FAULT "mov cr4: clear PAE in long mode", GP, 0, mov cr4, rax
    mov rax, rbx
    bts rax, 12
    FAULT "mov cr4: LA57 in long mode", GP, 0, mov cr4, rax
    mov rcx, cr4
    CHECK "cr4 unchanged", rcx, rbx
    ret
