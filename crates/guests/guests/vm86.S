// Virtual-8086 mode: IRETD to it, interrupts and exceptions out of it, what IOPL and the I/O bitmap
// allow there. Each piece of code ends by an exception; what the handler finds is checked in 64-bit
// mode at the end.
// Intel SDM vol. 3, 21.2 (virtual-8086 mode), 21.3 (interrupts in it); vol. 1, 19.5.2 (I/O bitmap).
#include "berth.inc"
    .text
    .globl main
#define REAL     0x9000                 /* page that the code runs in */
#define SEG      0x900
#define SEG_TSS  FREE_SEL               /* 32-bit TSS */
#define SEG_CONF 0x70                   /* conforming 32-bit code, DPL 0 */
#define FL_VM    0x20000
#define R(x) ((x) - real_begin)
    .set FRAME_EIP, 0
    .set FRAME_CS, 4
    .set FRAME_FLAGS, 8
    .set FRAME_ESP, 12
    .set FRAME_SS, 16
    .set FRAME_ES, 20
    .set FRAME_DS, 24
    .set FRAME_FS, 28
    .set FRAME_GS, 32
    // What is kept of a run: the frame, then
    .set RUN_SIZE, 64
    .set RUN_VEC, 36
    .set RUN_ERR, 40
    .set RUN_EAX, 44
    .set RUN_DEPTH, 48
    .set RUN_DS, 52
    .set RUN_EBX, 56
    .set runs, 0
    // V86 iopl, at: runs the code at `at` until an exception; EDI points to what is kept of it.
    .macro V86 iopl, at
    push 0x5000                         // GS
    push 0x4000                         // FS
    push 0x2000                         // DS
    push 0x3000                         // ES
    push SEG                            // SS
    push 0xffe                          // ESP
    push FL_VM | (\iopl << 12) | 2
    push SEG
    push R(\at)
    mov edi, offset results + RUN_SIZE * runs
    mov eax, 0xaaaa5555
    xor ebx, ebx
    mov dword ptr [resume], offset .Lr\@
    iretd
.Lr\@:
    .set runs, runs + 1
    .endm
    .macro KEPT name, run, what, want
    mov eax, [results + RUN_SIZE * \run + RUN_\what]
    mov edx, \want
    CHECK "\name", rax, rdx
    .endm
    .macro FRAME name, run, what, want
    mov eax, [results + RUN_SIZE * \run + FRAME_\what]
    mov edx, \want
    CHECK "\name", rax, rdx
    .endm
    .macro AT name, run, label
    mov eax, [results + RUN_SIZE * \run + FRAME_EIP]
    mov edx, offset \label
    sub edx, offset real_begin
    CHECK "\name", rax, rdx
    .endm
    // A fault of the instruction at `at`.
    .macro ENDED name, run, vec, err, at
    KEPT "\name", \run, VEC, \vec
    KEPT "\name: error code", \run, ERR, \err
    AT "\name: saved EIP", \run, \at
    .endm
main:
    mov rax, 0x00cf9f000000ffff
    mov [gdt + SEG_CONF], rax
    // With a bitmap of ports behind it.
    TSS_DESCRIPTOR SEG_TSS, tss32, 257
    mov dword ptr [tss32 + 4], offset stack0
    mov dword ptr [tss32 + 8], KDS
    mov word ptr [tss32 + 102], 104
    // All ports are closed but 0x80.
    mov edi, offset tss32 + 104
    mov ecx, 257
    mov al, 0xff
    rep stosb
    mov byte ptr [tss32 + 104 + 16], 0xfe
    mov rsi, offset real_begin
    mov edi, REAL
    mov ecx, offset real_end - real_begin
    rep movsb
    LEAVE_LONG
    mov ax, SEG_TSS
    ltr ax

    V86 0, v_enter
    V86 0, v_memory
    V86 0, v_cli
    V86 0, v_sti
    V86 0, v_pushf
    V86 0, v_popf
    V86 0, v_int
    V86 0, v_iret
    V86 2, v_pushf
    V86 3, v_flags
    V86 3, v_int
    V86 3, v_int22
    V86 3, v_int23
    V86 3, v_iret3
    V86 3, v_far
    V86 3, v_hlt
    V86 3, v_cr0
    V86 3, v_sldt
    V86 3, v_lar
    V86 3, v_arpl
    V86 0, v_out
    V86 3, v_in
    V86 3, v_limit0
    V86 0, v_divide0
    V86 0, v_vex
    // A target beyond 64 KiB: #GP(0) of the IRETD itself.
    mov dword ptr [resume], offset 1f
    mov edi, offset results + RUN_SIZE * runs
    push 0
    push 0
    push 0
    push 0
    push SEG
    push 0xffe
    push FL_VM | 2
    push SEG
    push 0x10000
far_iret:
    iretd
1:
    ENTER_LONG
    LONG_AGAIN
    LOAD_TSS
    ENDED "int3", 0, BP, 0, v_entered
    FRAME "cs", 0, CS, SEG
    FRAME "flags: VM, fixed", 0, FLAGS, FL_VM|2
    FRAME "esp", 0, ESP, 0xffe
    FRAME "ss", 0, SS, SEG
    FRAME "es", 0, ES, 0x3000
    FRAME "ds", 0, DS, 0x2000
    FRAME "fs", 0, FS, 0x4000
    FRAME "gs", 0, GS, 0x5000
    KEPT "nine dwords are pushed", 0, DEPTH, 36
    KEPT "ds of the handler is null", 0, DS, 0
    KEPT "mov ax, cs: the upper half stays", 0, EAX, 0xaaaa0900
    KEPT "a store by ds, a load by a changed ds", 1, EAX, 0xaaaa0077
    FRAME "the changed ds is saved", 1, DS, 0x2001
    movzx eax, byte ptr [0x20017]
    CHECK "where it was stored", rax, 0x77
    ENDED "cli, IOPL 0", 2, GP, 0, v_cli
    ENDED "sti, IOPL 0", 3, GP, 0, v_sti
    ENDED "pushf, IOPL 0", 4, GP, 0, v_pushf
    ENDED "popf, IOPL 0", 5, GP, 0, v_popf
    ENDED "int 0x21, IOPL 0", 6, GP, 0, v_int
    ENDED "iret, IOPL 0", 7, GP, 0, v_iret
    ENDED "pushf, IOPL 2", 8, GP, 0, v_pushf
    KEPT "IOPL 3: pushf, popf, cli, sti", 9, VEC, BP
    KEPT "IOPL 3: popf keeps IOPL, sets IF and CF", 9, EAX, 0xaaaa3203
    KEPT "IOPL 3: cli clears IF", 9, EBX, 0x3003
    FRAME "IOPL 3: VM stays", 9, FLAGS, FL_VM|0x3203
    KEPT "int 0x21, IOPL 3", 10, VEC, 0x21
    AT "int 0x21, IOPL 3: saved EIP", 10, v_iret
    ENDED "int through a gate of DPL 0", 11, GP, 0x22*8+2, v_int22
    ENDED "int to a conforming segment", 12, GP, 0x70, v_int23
    KEPT "iret, IOPL 3", 13, EAX, 0xaaaa1313
    FRAME "iret, IOPL 3: flags", 13, FLAGS, FL_VM|0x3043
    KEPT "far jump, call, return", 14, EAX, 0xaaaa0007
    FRAME "far jump: cs", 14, CS, 0x8ff
    ENDED "hlt", 15, GP, 0, v_hlt
    ENDED "mov eax, cr0", 16, GP, 0, v_cr0
    ENDED "sldt", 17, UD, 0, v_sldt
    ENDED "lar", 18, UD, 0, v_lar
    ENDED "arpl", 19, UD, 0, v_arpl
    KEPT "out to a port that is open", 20, VEC, BP
    ENDED "in from a closed port, IOPL 3", 21, GP, 0, v_in
    ENDED "a word at 0xffff", 22, GP, 0, v_limit
    ENDED "divide error", 23, DE, 0, v_divide
    ENDED "vex prefix", 24, UD, 0, v_vex
    KEPT "iretd to beyond 64 KiB", 25, VEC, GP
    KEPT "iretd to beyond 64 KiB: error code", 25, ERR, 0
    mov eax, [results + RUN_SIZE * 25 + FRAME_EIP]
    mov edx, offset far_iret
    CHECK "iretd to beyond 64 KiB: saved EIP", rax, rdx
    ret

    .code32
    .macro STUB v, code
stub_\v:
    .ifeq \code
    push 0
    .endif
    push \v
    jmp common
    .endm
    STUB 0, 0
    STUB 3, 0
    STUB 6, 0
    STUB 10, 1
    STUB 12, 1
    STUB 13, 1
    STUB 33, 0
common:
    // The data segments are null; the stack is flat.
    mov ss:[edi + RUN_EAX], eax
    mov ss:[edi + RUN_EBX], ebx
    mov eax, ds
    mov ss:[edi + RUN_DS], eax
    mov ax, KDS
    mov ds, ax
    mov es, ax
    pop dword ptr [edi + RUN_VEC]
    pop dword ptr [edi + RUN_ERR]
    mov eax, offset stack0
    sub eax, esp
    mov [edi + RUN_DEPTH], eax
    mov esi, esp
    mov ecx, 9
    rep movsd
    mov esp, offset stack32
    jmp dword ptr [resume]
    .code64

    .data
    .align 8
    // GATE dpl, to, selector; the guest lies in the second MiB.
    .macro GATE dpl, to, selector=KCS32
    .word \to - 0x100000
    .word \selector, 0x8e00 | (\dpl << 13), 0x10
    .endm
idt32:
    GATE 0, stub_0
    .quad 0, 0
    GATE 3, stub_3
    .quad 0, 0
    GATE 0, stub_6
    .quad 0, 0, 0
    GATE 0, stub_10
    .quad 0
    GATE 0, stub_12
    GATE 0, stub_13
    .rept 19
    .quad 0
    .endr
    GATE 3, stub_33
    GATE 0, stub_33
    GATE 3, stub_33, SEG_CONF
idt32_ptr: .word . - idt32 - 1
    .long idt32

    // ---- copied to REAL ----
    .text
    .code16
    .align 16
real_begin:
v_enter:
    mov ax, cs
    int3
v_entered:
v_memory:
    mov byte ptr [0x17], 0x77
    mov bx, 0x2001
    mov ds, bx
    mov ax, 0
    mov al, [7]
    int3
v_cli: cli
v_sti: sti
v_pushf: pushf
v_popf: popf
v_int: int 0x21
v_iret: iret
v_flags:
    push 0x203
    popf
    pushf
    pop ax
    cli
    pushf
    pop bx
    sti
    nop
    int3
v_int22: int 0x22
v_int23: int 0x23
v_iret3:
    push 0x43
    push cs
    push R(1f)
    iret
    ud2
1:  mov ax, 0x1313
    int3
v_far:
    mov ax, 0
    .byte 0xea
    .word R(1f) + 16, SEG - 1
    ud2
1:  or ax, 1
    .byte 0x9a
    .word R(2f) + 16, SEG - 1
    or ax, 4
    int3
2:  or ax, 2
    retf
v_hlt: hlt
v_cr0: mov eax, cr0
v_sldt: sldt ax
v_lar: lar ax, bx
v_arpl: .byte 0x63, 0xd8                // arpl ax, bx
v_out:
    out 0x80, al
    int3
v_in: in al, 0x60
v_limit0: mov bx, 0xffff
v_limit: mov ax, [bx]
v_divide0: mov cl, 0
v_divide: div cl
v_vex: .byte 0xc5, 0xf0, 0x58, 0xc2     // vaddps xmm0, xmm1, xmm2
real_end:
    .code64

    .bss
    .align 16
results: .skip RUN_SIZE * 32
tss32: .skip 104 + 260
resume: .skip 4
    .skip 4096
stack32: .skip 16
    .skip 4096
stack0: .skip 16
