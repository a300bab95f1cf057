// #GP, #NP, #SS, #TS with their error codes: selectors, non-canonical addresses, privileged
// instructions, reserved bits. Intel SDM vol. 3, 6.13 (error code), 6.15; vol. 2 per instruction.
#include "berth.inc"
    .text
    .globl main
#define NONCANON 0x0000800000000000
#define SEL_NP_DATA  0x68
#define SEL_NP_CODE  0x70
#define SEL_XONLY    0x78
#define SEL_DPL3CODE 0x80
#define SEL_NP_TSS   0x88
#define SEL_BUSY_TSS 0x98
#define SEL_NP_LDT   0xa8
#define SEL_RO_DATA  0xb8
main:
    mov rax, 0x00cf13000000ffff         // data, not present
    mov [gdt + SEL_NP_DATA], rax
    mov rax, 0x00af1b000000ffff         // 64-bit code, not present
    mov [gdt + SEL_NP_CODE], rax
    mov rax, 0x00af99000000ffff         // 64-bit code, execute only
    mov [gdt + SEL_XONLY], rax
    mov rax, 0x00affb000000ffff
    mov [gdt + SEL_DPL3CODE], rax
    mov rax, 0x00cf91000000ffff         // data, read only
    mov [gdt + SEL_RO_DATA], rax
    mov rdi, offset gdt + SEL_NP_TSS
    mov rax, offset tss
    mov ecx, 0x09
    mov edx, 103
    call make_system_descriptor
    mov rdi, offset gdt + SEL_BUSY_TSS
    mov ecx, 0x8b
    call make_system_descriptor
    mov rdi, offset gdt + SEL_NP_LDT
    mov ecx, 0x02
    mov edx, 15
    call make_system_descriptor

    // MOV Sreg (vol. 2, MOV): #GP(selector), #NP(selector), #SS(selector) for SS not present.
    mov ax, 0x1f8
    FAULT "mov ds, empty descriptor", GP, 0x1f8, mov ds, ax
    mov ax, 0x1fb
    FAULT "mov ds: RPL is not in the error code", GP, 0x1f8, mov ds, ax
    mov ax, 0x2000
    FAULT "mov ds beyond the GDT limit", GP, 0x2000, mov ds, ax
    mov ax, 0x0c
    FAULT "mov ds from an absent LDT", GP, 0x0c, mov ds, ax
    mov ax, SEL_NP_DATA
    FAULT "mov es not present", NP, SEL_NP_DATA, mov es, ax
    FAULT "mov fs not present", NP, SEL_NP_DATA, mov fs, ax
    FAULT "mov ss not present", SS_, SEL_NP_DATA, mov ss, ax
    mov ax, SEL_XONLY
    FAULT "mov ds execute-only code", GP, SEL_XONLY, mov ds, ax
    mov ax, KCS
    FINE "mov ds readable code", mov ds, ax
    FAULT "mov ss code segment", GP, KCS, mov ss, ax
    mov ax, UDS
    FAULT "mov ss with DPL and RPL 3 at CPL 0", GP, UDS & ~3, mov ss, ax
    FINE "mov ds with RPL 3, DPL 3", mov ds, ax
    mov ax, KDS | 3
    FAULT "mov ds with RPL 3, DPL 0", GP, KDS, mov ds, ax
    mov ax, SEL_RO_DATA
    FAULT "mov ss read-only data", GP, SEL_RO_DATA, mov ss, ax
    xor eax, eax
    FINE "mov ss null at CPL 0, 64-bit", mov ss, ax
    mov ax, 3
    FAULT "mov ss null with RPL 3 at CPL 0", GP, 0, mov ss, ax
    FINE "mov ds null with RPL 3", mov ds, ax
    mov ax, KDS
    mov ss, ax
    mov ds, ax
    mov ax, TSS_SEL
    FAULT "mov ds a system descriptor", GP, TSS_SEL, mov ds, ax
    // LFS and LSS from memory.
    FAULT "lss not present", SS_, SEL_NP_DATA, lss eax, [far_np]
    FAULT "lfs not present", NP, SEL_NP_DATA, lfs eax, [far_np]

    // LTR and LLDT.
    xor eax, eax
    FAULT "ltr null", GP, 0, ltr ax
    mov ax, KDS
    FAULT "ltr of a data segment", GP, KDS, ltr ax
    mov ax, SEL_NP_TSS
    FAULT "ltr not present", NP, SEL_NP_TSS, ltr ax
    mov ax, SEL_BUSY_TSS
    FAULT "ltr of a busy TSS", GP, SEL_BUSY_TSS, ltr ax
    mov ax, 0x1f0
    FAULT "ltr beyond", GP, 0x1f0, ltr ax
    mov ax, 0x4c
    FAULT "ltr with TI set", GP, 0x4c, ltr ax
    and byte ptr [gdt + TSS_SEL + 5], ~2 // a good TR again, should one of these have succeeded
    mov ax, TSS_SEL
    ltr ax
    mov ax, SEL_NP_LDT
    FAULT "lldt not present", NP, SEL_NP_LDT, lldt ax
    mov ax, TSS_SEL
    FAULT "lldt of a TSS", GP, TSS_SEL, lldt ax
    xor eax, eax
    FINE "lldt null", lldt ax

    // Far transfers: null, data, DPL, not present (vol. 2, JMP, CALL, RET far).
    FAULT "far jmp null", GP, 0, jmp fword ptr [far_null]
    FAULT "far jmp to data", GP, KDS, jmp fword ptr [far_data]
    FAULT "far jmp not present", NP, SEL_NP_CODE, jmp fword ptr [far_npcode]
    FAULT "far jmp DPL 3 at CPL 0", GP, SEL_DPL3CODE, jmp fword ptr [far_dpl3]
    FAULT "far call not present", NP, SEL_NP_CODE, call fword ptr [far_npcode]
    FAULT "far jmp to a TSS (no task switch in 64-bit)", GP, TSS_SEL, jmp fword ptr [far_tss]
    push 0
    push offset 1f
    FAULT "retf null", GP, 0, retfq
    push SEL_NP_CODE
    push offset 1f
    FAULT "retf not present", NP, SEL_NP_CODE, retfq
1:  mov rsp, [fixup_rsp]
    add rsp, 32

    // Non-canonical addresses: #GP(0), through RSP or RBP #SS(0) (vol. 1, 3.3.7.1).
    mov rsi, NONCANON
    FAULT "load non-canonical", GP, 0, mov rax, [rsi]
    FAULT "store non-canonical", GP, 0, mov [rsi], rax
    FAULT "store non-canonical + index", GP, 0, mov [rsi + rax * 8], eax
    FAULT "rep movsb non-canonical", GP, 0, rep movsb
    FAULT "lodsb non-canonical", GP, 0, lodsb
    FAULT "push m non-canonical", GP, 0, push [rsi]
    FAULT "jmp m non-canonical", GP, 0, jmp [rsi]
    FAULT "jmp to a non-canonical rip", GP, 0, jmp rsi
    FAULT "call to a non-canonical rip", GP, 0, call rsi
    mov rdi, -1
    FAULT "load that wraps at 2^64 to the hole's other side", PF, 0, mov rax, [rdi - 0xfff]
    mov rdi, 0x00007ffffffffffc
    FAULT "load that reaches into the hole", GP, 0, mov rax, [rdi]
    lea rdi, [rdi + 8]
    push rbp
    mov rbp, rsi
    FAULT "load via rbp non-canonical", SS_, 0, mov rax, [rbp]
    FAULT "store via rbp + index non-canonical", SS_, 0, mov [rbp + rcx * 1], rax
    FAULT "leave non-canonical", SS_, 0, leave
    pop rbp
    // RSP itself; the handlers take a stack of their own.
    mov edi, SS_
    mov esi, 3
    call set_ist
    ARM 1f
    mov rax, NONCANON
    mov rsp, rax
2:  push rax
1:  CHECK_EXC "push non-canonical", SS_, 0, 2b
    ARM 1f
    mov rsp, rax
2:  call main
1:  CHECK_EXC "call with rsp non-canonical", SS_, 0, 2b
    ARM 1f
    mov rsp, rax
2:  ret
1:  CHECK_EXC "ret non-canonical rsp", SS_, 0, 2b
    mov edi, SS_
    xor esi, esi
    call set_ist
    // RET to a non-canonical address: the fault is at the RET (vol. 2, RET: RIP checked first).
    mov rax, NONCANON
    push rax
    FAULT "ret to a non-canonical rip", GP, 0, ret
    pop rax

    mov rax, 0x100
    FAULT "mov cr8: bit 8", GP, 0, mov cr8, rax
    mov rax, 0x100000000
    FAULT "mov dr7: bit 32", GP, 0, mov dr7, rax
    FAULT "mov dr6: bit 32", GP, 0, mov dr6, rax

    // MSRs.
    mov ecx, 0x4b564dff
    FAULT "rdmsr unknown", GP, 0, rdmsr
    FAULT "wrmsr unknown", GP, 0, wrmsr
    mov ecx, MSR_LSTAR
    mov edx, 0x8000
    xor eax, eax
    FAULT "wrmsr LSTAR non-canonical", GP, 0, wrmsr
    mov ecx, MSR_GS_BASE
    FAULT "wrmsr GS_BASE non-canonical", GP, 0, wrmsr
    mov ecx, MSR_KERNEL_GS_BASE
    FAULT "wrmsr KERNEL_GS_BASE non-canonical", GP, 0, wrmsr
    mov ecx, MSR_SYSENTER_EIP
    FAULT "wrmsr SYSENTER_EIP non-canonical", GP, 0, wrmsr
    mov ecx, MSR_EFER
    xor edx, edx
    mov eax, 0x901 | 0x10000
    FAULT "wrmsr EFER reserved bit", GP, 0, wrmsr
    mov eax, 0x801
    FAULT "wrmsr EFER clearing LME with paging", GP, 0, wrmsr
    mov ecx, 0x277
    mov eax, 0x00070602
    mov edx, 0x00070406
    FAULT "wrmsr PAT type 2", GP, 0, wrmsr

    // Alignment that instructions demand themselves: #GP(0).
    mov rsi, offset aligned + 8
    FAULT "movaps load unaligned", GP, 0, movaps xmm0, [rsi]
    FAULT "movaps store unaligned", GP, 0, movaps [rsi], xmm0
    FAULT "movdqa unaligned", GP, 0, movdqa xmm0, [rsi]
    FAULT "addps unaligned", GP, 0, addps xmm0, [rsi]
    FAULT "movntps unaligned", GP, 0, movntps [rsi], xmm0
    FINE "movups unaligned", movups xmm0, [rsi]
    FAULT "fxsave unaligned", GP, 0, fxsave [rsi]
    mov byte ptr [aligned + 16 + 7], 0
    FAULT "cmpxchg16b unaligned", GP, 0, cmpxchg16b [rsi]
    // MXCSR reserved bit (vol. 2, LDMXCSR).
    mov dword ptr [aligned], 0x10000
    FAULT "ldmxcsr reserved bit", GP, 0, ldmxcsr [aligned]

    // Privileged instructions at CPL 3: #GP(0) (vol. 3, 5.9).
    .macro PRIV name, insn:vararg
    USER_SECTION
.Lu\@: \insn
    int 0x81
    END_SECTION
    USER "cpl 3: \name", .Lu\@, GP, 0, .Lu\@
    .endm
    PRIV hlt, hlt
    PRIV clts, clts
    PRIV invd, invd
    PRIV wbinvd, wbinvd
    PRIV invlpg, invlpg [rax]
    PRIV lgdt, lgdt [rsp]
    PRIV lidt, lidt [rsp]
    PRIV lldt, lldt ax
    PRIV ltr, ltr ax
    PRIV lmsw, lmsw ax
    PRIV "mov from cr0", mov rax, cr0
    PRIV "mov to cr0", mov cr0, rax
    PRIV "mov from cr2", mov rax, cr2
    PRIV "mov to cr3", mov cr3, rax
    PRIV "mov from cr4", mov rax, cr4
    PRIV "mov from cr8", mov rax, cr8
    PRIV "mov from dr7", mov rax, dr7
    PRIV "mov to dr0", mov dr0, rax
    PRIV rdmsr, rdmsr
    PRIV wrmsr, wrmsr
    PRIV sysret, sysretq
    PRIV sysexit, .byte 0x0f, 0x35
    PRIV swapgs, swapgs
    PRIV cli, cli
    PRIV sti, sti
    PRIV "in al", in al, dx
    PRIV "out imm", out 0x80, al
    PRIV rdpmc, rdpmc
    // Software interrupts to a gate of DPL 0: #GP with IDT bit, EXT clear.
    USER_SECTION
ui: int 0x70
    END_SECTION
    USER "cpl 3: int through a DPL 0 gate", ui, GP, 0x70*8+2, ui
    USER_SECTION
ub: int3
ub1: nop
    END_SECTION
    USER "cpl 3: int3 through a DPL 3 gate", ub, BP, 0, ub1
    // INT1 ignores the DPL of its gate (vol. 2, INT1).
    USER_SECTION
u1: .byte 0xf1
u11: nop
    END_SECTION
    USER "cpl 3: int1 ignores gate DPL", u1, DB, 0, u11

    // RSP0 not canonical: stack switch raises #SS(0) while the exception is delivered (-> #DF
    // for #GP; for the benign #UD it is #SS itself, EXT set).
    mov edi, SS_
    mov esi, 3
    call set_ist
    mov rax, NONCANON
    mov [tss + 4], rax
    USER_SECTION
uud: ud2
    END_SECTION
    USER "cpl 3: #UD with rsp0 non-canonical", uud, SS_, 1, uud
    mov qword ptr [tss + 4], offset rsp0_top
    ret

    .data
    .align 16
aligned: .skip 64
far_np: .long 0
    .word SEL_NP_DATA
far_null: .long 0
    .word 0
far_data: .long 0
    .word KDS
far_npcode: .long 0
    .word SEL_NP_CODE
far_dpl3: .long 0
    .word SEL_DPL3CODE
far_tss: .long 0
    .word TSS_SEL
