// Rubbish into ports, PCI configuration space, MSRs and physical addresses without memory, from a
// fixed seed. The only expectation is that the machine is still there afterwards.
#include "berth.inc"
    .text
    .globl main
main:
    mov qword ptr [seed], 0x2545f4914f6cdd1d & 0x7fffffff
    mov qword ptr [hooks + 0xff * 8], offset on_any
    mov dword ptr [APIC + 0xf0], 0x1ff
    // Reads of every port but the ones whose reading has an effect here.
    xor ebx, ebx
1:  mov edx, ebx
    in al, dx
    in ax, dx                           // QEMU 7.2 aborts here at the serial port's registers
    in eax, dx
    inc ebx
    cmp ebx, 0x10000
    jb 1b
    CHECK "all ports read", rbx, 0x10000
    // Writes of random values, sparing the debug exit, reset, power and the serial port.
    mov ebx, 20000
1:  call random
    movzx edx, ax
    cmp edx, 0x61
    jb 3f                               // DMA, PIC, PIT, keyboard controller: below
    cmp edx, 0x1000
    jae 2f
    cmp edx, 0xcf8
    jb 3f
2:  cmp edx, 0x8000
    jae 3f                              // I/O windows of devices and of power management
    call random
    out dx, al
    out dx, ax
    out dx, eax
3:  dec ebx
    jnz 1b
    CHECK "random port writes", rbx, 0
    // PCI configuration: every register of every function of bus 0 read; writes of random bytes to
    // BARs and capabilities of functions that are there, restored afterwards.
    xor ebx, ebx
1:  mov eax, ebx
    shl eax, 8
    or eax, 0x80000000
    mov r8d, eax
    mov ecx, 0
2:  lea eax, [r8 + rcx]
    mov dx, 0xcf8
    out dx, eax
    mov dx, 0xcfc
    in eax, dx
    mov r9d, eax
    cmp eax, -1
    je 3f
    cmp ecx, 0x10
    jb 3f
    push rax
    call random
    out dx, eax
    in eax, dx
    mov dx, 0xcff
    call random
    out dx, al
    in al, dx
    pop rax
    mov dx, 0xcfc
    out dx, eax
3:  add ecx, 4
    cmp ecx, 256
    jb 2b
    inc ebx
    cmp ebx, 256
    jb 1b
    CHECK "pci configuration space", rbx, 256
    // Unaligned, out-of-range and disabled configuration accesses.
    mov ebx, 5000
1:  call random
    mov dx, 0xcf8
    and eax, ~0x40
    out dx, eax
    and eax, 3
    lea edx, [rax + 0xcfc]
    in al, dx
    in ax, dx
    in eax, dx
    dec ebx
    jnz 1b
    CHECK "odd configuration accesses", rbx, 0
    // Random MSRs: read, and written where reading failed. A fault each is fine.
    mov ebx, 3000
    xor r13d, r13d
1:  call random
    mov r12d, eax
    cmp ebx, 2000
    jae 2f
    and r12d, 0x1fff
    cmp ebx, 1000
    jae 2f
    or r12d, 0xc0000000
2:  cmp r12d, MSR_APIC_BASE
    je 4f
    ARM 3f
    mov ecx, r12d
    rdmsr
    mov qword ptr [fixup], 0
    jmp 4f
3:  ARM 4f
    call random
    mov edx, eax
    call random
    mov ecx, r12d
    wrmsr
    mov qword ptr [fixup], 0
4:  inc r13d
    dec ebx
    jnz 1b
    CHECK "random msrs", r13, 3000
    // Physical holes: above RAM (64 MiB at most is given) up to the APICs, all sizes.
    mov ebx, 3000
1:  call random
    mov esi, eax
    and esi, 0x1ffffff0
    or esi, 0xa0000000
    mov al, [rsi]
    mov ax, [rsi + 1]
    mov eax, [rsi + 2]
    mov rax, [rsi + 3]
    movups xmm0, [rsi + 1]
    mov [rsi], al
    mov [rsi + 3], eax
    mov [rsi + 5], rax
    movups [rsi], xmm0
    lock inc dword ptr [rsi]
    xchg [rsi + 8], rax
    dec ebx
    jnz 1b
    CHECK "accesses to physical holes", rbx, 0
    mov rax, [rsi]
    // REP over a hole, and from a hole into memory.
    mov edi, 0xb0000000
    mov ecx, 4096
    rep stosb
    mov esi, 0xb0000ff0
    mov rdi, offset buffer
    mov ecx, 4096
    rep movsb
    CHECK "strings over holes", rcx, 0
    // Local APIC and I/O APIC: every register read, all sizes; random writes but not to ICR.
    mov ebx, 0
1:  mov eax, [APIC + rbx]
    mov al, [APIC + rbx + 1]
    mov rax, [APIC + rbx + 4]
    add ebx, 16
    cmp ebx, 0xff0
    jb 1b
    CHECK "apic registers read", rbx, 0xff0
    mov ebx, 2000
1:  call random
    mov edx, eax
    and edx, 0xff0
    cmp edx, 0x300
    jae 2f                              // ICR and the local vector table
    call random
    mov [APIC + rdx], eax
2:  call random
    mov edx, eax
    and edx, 0xf
    shl edx, 4
    mov [IOAPIC], eax
    mov eax, [IOAPIC + rdx]
    dec ebx
    jnz 1b
    CHECK "apic rubbish", rbx, 0
    // CPUID of random leaves.
    mov r8d, 2000
1:  call random
    mov ecx, eax
    call random
    cpuid
    dec r8d
    jnz 1b
    CHECK "random cpuid leaves", r8, 0
    // Random bytes as code at CPL 3; the local APIC's timer ends loops. Without SYSCALL, whose target
    // may be rubbish by now.
    RDMSR64 MSR_EFER
    btr eax, 0
    wrmsr
    mov dword ptr [APIC + 0xf0], 0x1ff
    mov dword ptr [APIC + 0x80], 0
    mov dword ptr [APIC + 0x3e0], 0xb
    mov dword ptr [APIC + 0x320], 0x40
    mov r14d, 2000
    xor r13d, r13d
1:  call random
    mov [u_rubbish], eax
    call random
    mov [u_rubbish + 4], eax
    mov qword ptr [user_rsp], offset u_stack
    mov qword ptr [user_flags], 0x202
    mov rdi, offset u_rubbish
    mov dword ptr [APIC + 0x380], 1000000
    call call_user
    mov dword ptr [APIC + 0x380], 0
    mov dword ptr [APIC + 0xb0], 0
    inc r13d
    dec r14d
    jnz 1b
    CHECK "random user code", r13, 2000
    ret
on_any:
    ret
random:                                 // RAX; keeps the rest
    mov rax, [seed]
    push rdx
    mov rdx, rax
    shl rdx, 13
    xor rax, rdx
    mov rdx, rax
    shr rdx, 7
    xor rax, rdx
    mov rdx, rax
    shl rdx, 17
    xor rax, rdx
    mov [seed], rax
    pop rdx
    ret
    USER_SECTION
    .align 16
u_rubbish:
    .skip 8, 0x90
    .rept 16
    int 0x80
    .endr
    .skip 1024
u_stack:
    .skip 64
    END_SECTION
    .bss
seed: .skip 8
    .align 4096
buffer: .skip 8192
