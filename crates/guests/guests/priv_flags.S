// The flags that POPF, IRET, CLI, STI and PUSHF may change or show, by CPL and IOPL.
// Intel SDM vol. 2, POPF/POPFD/POPFQ (table 4-15), IRET, CLI, STI; vol. 3, 6.8.1.
#include "berth.inc"
    .text
    .globl main
main:
    // CPL 0: POPFQ changes IOPL, IF, NT, AC, ID; never RF (cleared), VM, reserved bits.
    cli
    pushfq
    pop rbx
    push 0x247cd7
    popfq
    pushfq
    pop rax
    push 2
    popfq
    CHECK "cpl 0: popfq sets all that it may (IF left 0)", rax, 0x247cd7
    push 0x10002
    popfq
    pushfq
    pop rax
    CHECK "cpl 0: popfq does not set RF", rax, 2
    push 0x20002
    popfq
    pushfq
    pop rax
    CHECK "cpl 0: popfq does not set VM", rax, 2
    push 0x180002
    popfq
    pushfq
    pop rax
    CHECK "cpl 0: popfq does not set VIF and VIP", rax, 2
    push -1 & ~0x300 & ~0x7fc00000
    popfq
    pushfq
    pop rax
    push 2
    popfq
    and rax, ~0x18fd5
    and rax, ~0x247fd5
    CHECK "cpl 0: reserved bits stay as they are", rax, 2
    push 0x3002
    popfq
    .byte 0x66
    pushf
    movzx eax, word ptr [rsp]
    add rsp, 2
    CHECK "pushfw: 16 bits", rax, 0x3002
    sub rsp, 2
    mov word ptr [rsp], 0x0ad7
    push 0x40002
    popfq
    .byte 0x66
    popf
    cli
    pushfq
    pop rax
    push 2
    popfq
    CHECK "popfw leaves the upper bits", rax, 0x408d7
    // STI and CLI.
    sti
    pushfq
    pop rax
    cli
    pushfq
    pop rdx
    and eax, FL_IF
    and edx, FL_IF
    CHECK "cpl 0: sti", rax, FL_IF
    CHECK "cpl 0: cli", rdx, 0
    // SAHF and LAHF reach only the low byte; bit 1 is 1, bits 3 and 5 are 0.
    mov ah, 0xff
    sahf
    pushfq
    pop rax
    CHECK "sahf: low byte", rax, 0xd7
    xor ah, ah
    sahf
    mov eax, 0
    lahf
    movzx eax, ah
    CHECK "lahf: bit 1", rax, 2

    // CPL 3, for IOPL 0 and 3: what POPF does to IF and IOPL; CLI and STI fault or work.
    .macro CASE name, flags, func, vec, err, want
    mov qword ptr [user_flags], \flags
    USER "\name", \func, \vec, \err
    mov rax, [exc_rflags]
    CHECK "\name: rflags", rax, \want
    .endm
    CASE "cpl 3, iopl 0: popf of IF and IOPL 3", 0x002, u_popf_3202, NONE, 0, 0x002
    CASE "cpl 3, iopl 0: popf clearing IF", 0x202, u_popf_0002, NONE, 0, 0x202
    CASE "cpl 3, iopl 3: popf clearing IF", 0x3202, u_popf_0002, NONE, 0, 0x3002
    CASE "cpl 3, iopl 3: popf setting IF, IOPL 0", 0x3002, u_popf_0202, NONE, 0, 0x3202
    CASE "cpl 3, iopl 0: popf of NT, AC, ID, DF", 0x002, u_popf_misc, NONE, 0, 0x244402
    CASE "cpl 3, iopl 0: cli", 0x202, u_cli, GP, 0, 0x10202
    CASE "cpl 3, iopl 0: sti", 0x002, u_sti, GP, 0, 0x10002
    CASE "cpl 3, iopl 1: cli", 0x1202, u_cli, GP, 0, 0x11202
    CASE "cpl 3, iopl 2: sti", 0x2002, u_sti, GP, 0, 0x12002
    CASE "cpl 3, iopl 3: cli", 0x3202, u_cli, NONE, 0, 0x3002
    CASE "cpl 3, iopl 3: sti", 0x3002, u_sti, NONE, 0, 0x3202
    CASE "cpl 3, iopl 0: iretq to the same level keeps IF and IOPL", 0x202, u_iret, NONE, 0, 0x202
    CASE "cpl 3, iopl 3: iretq to the same level changes IF, not IOPL", 0x3202, u_iret, NONE, 0, 0x3002
    CASE "cpl 3, iopl 0: pushf shows IF and IOPL", 0x202, u_pushf, NONE, 0, 0x202
    mov qword ptr [user_flags], 0x1202
    USER "cpl 3: pushf", u_pushf, NONE
    CHECK "cpl 3: pushf shows IF 1, IOPL 1", rax, 0x1202
    mov qword ptr [user_flags], 2

    // Exceptions set RF in the saved flags when they are faults (vol. 3, 17.3.1.1), not traps.
    FAULT "fault", UD, 0, ud2
    mov rax, [exc_rflags]
    and eax, FL_RF
    CHECK "fault: RF set in the saved flags", rax, FL_RF
    TRAP "trap", BP, 0, int3
    mov rax, [exc_rflags]
    and eax, FL_RF
    CHECK "trap: RF clear in the saved flags", rax, 0
    // Delivery clears TF, NT, RF, VM, and IF for an interrupt gate; a trap gate leaves IF.
    mov qword ptr [hooks + 0x88 * 8], offset on_88
    push FL_IF | FL_NT | FL_AC | 0xd7
    popfq
    int 0x88
    pushfq
    pop rbx
    push 2
    popfq
    CHECK "interrupt gate: IF, NT clear, AC kept", "qword ptr [inside]", FL_AC | 2
    and ebx, FL_IF | FL_NT | FL_AC
    CHECK "iret restores IF, NT, AC", rbx, FL_IF | FL_NT | FL_AC
    mov byte ptr [idt + 0x88 * 16 + 5], 0xef
    push FL_IF | 2
    popfq
    int 0x88
    cli
    CHECK "trap gate: IF kept", "qword ptr [inside]", FL_IF | 2
    ret
on_88:
    pushfq
    pop rax
    and eax, ~0x8d5                     // arithmetic flags are the hook's own
    mov [inside], rax
    ret

    USER_SECTION
u_popf_3202:
    push 0x3202
    popfq
    int 0x80
u_popf_0002:
    push 2
    popfq
    int 0x80
u_popf_0202:
    push 0x202
    popfq
    int 0x80
u_popf_misc:
    push 0x247fd7 & ~0x3b00 & ~0x8d5
    popfq
    int 0x80
u_cli:
    cli
    int 0x80
u_sti:
    sti
    int 0x80
u_iret:
    mov rax, rsp
    mov ecx, ss
    push rcx
    push rax
    mov eax, 2                          // IF 0, IOPL 0
    push rax
    mov ecx, cs
    push rcx
    push offset 1f
    iretq
1:  int 0x80
u_pushf:
    pushfq
    pop rax
    int 0x80
    END_SECTION
    .bss
inside: .skip 8
