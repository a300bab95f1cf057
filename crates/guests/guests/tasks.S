// Hardware task switches in 32-bit protected mode: CALL, JMP and IRET between tasks, task gates for
// exceptions with and without an error code, busy bits, the link, and a task that cannot run.
// Intel SDM vol. 3, 7.2 (TSS), 7.3 (switching), 7.4 (nesting), 6.12.2 (interrupt tasks).
#include "berth.inc"
    .text
    .globl main
#define SEG_MAIN  FREE_SEL
#define SEG_OTHER 0x70
#define SEG_GATE  0x78
#define SEG_FAULT 0x80                  /* the task for exceptions */
#define SEG_BAD   0x88
#define T_EIP 0x20
#define T_FLAGS 0x24
#define T_EAX 0x28
#define T_ESP 0x38
#define T_ES 0x48
#define T_CS 0x4c
#define T_SS 0x50
#define T_DS 0x54
#define FL_NT_BIT 0x4000
    .macro RESULT name, n, want
    mov eax, [results + 4 * \n]
    mov edx, \want
    CHECK "\name", rax, rdx
    .endm
    .macro RESULT_AT name, n, want, less=0
    mov eax, [results + 4 * \n]
    mov edx, offset \want
    sub edx, \less
    CHECK "\name", rax, rdx
    .endm
    // STORE n: EAX is result n.
    .macro STORE n
    mov [results + 4 * \n], eax
    .endm
    // A task that begins at `entry` with a stack of its own.
    .macro TASK at, entry, stack
    mov dword ptr [\at + T_EIP], offset \entry
    mov dword ptr [\at + T_FLAGS], 2
    mov dword ptr [\at + T_EAX], 0x1111
    mov dword ptr [\at + T_ESP], offset \stack
    mov dword ptr [\at + T_ES], KDS
    mov dword ptr [\at + T_CS], KCS32
    mov dword ptr [\at + T_SS], KDS
    mov dword ptr [\at + T_DS], KDS
    .endm
main:
    TSS_DESCRIPTOR SEG_MAIN, tss_main
    TSS_DESCRIPTOR SEG_OTHER, tss_other
    TSS_DESCRIPTOR SEG_FAULT, tss_fault
    TSS_DESCRIPTOR SEG_BAD, tss_bad
    mov rax, 0x0000e50000700000
    mov [gdt + SEG_GATE], rax
    TASK tss_other, other, stack_other
    TASK tss_fault, on_fault, stack_fault
    TASK tss_bad, bad, stack_bad
    mov dword ptr [tss_bad + T_DS], 0x1f8
    LEAVE_LONG
    mov ax, SEG_MAIN
    ltr ax
    clts

    // CALL and the way back, twice: the task goes on where it left.
    mov eax, 0x2222
    mov ebx, 0x3333
    call SEG_OTHER:0
    STORE 0                             // EAX is this task's
    mov eax, ebx
    STORE 1
    mov eax, cr0
    and eax, CR0_TS
    STORE 2
    xor eax, eax
    str ax
    STORE 3
    movzx eax, byte ptr [gdt + SEG_MAIN + 5]
    STORE 4
    movzx eax, byte ptr [gdt + SEG_OTHER + 5]
    STORE 5
    call SEG_GATE:0
    mov eax, [calls]
    STORE 6
    pushfd
    pop eax
    and eax, FL_NT_BIT
    STORE 7
    // JMP there; it jumps back.
    mov dword ptr [jump_back], 1
    jmp SEG_OTHER:0
    mov dword ptr [jump_back], 0
    movzx eax, byte ptr [gdt + SEG_OTHER + 5]
    STORE 8
    movzx eax, byte ptr [gdt + SEG_MAIN + 5]
    STORE 9
    // Exceptions through task gates; the handler moves EIP on by two bytes.
at_ud:
    ud2
    mov eax, [fault_eip]
    STORE 10
    mov eax, [fault_flags]
    and eax, FL_NT_BIT
    STORE 11
    mov eax, [fault_stack]
    STORE 12
    mov dword ptr [has_code], 1
    mov ax, 0x1f8
at_gp:
    mov es, ax                          // 2 bytes
    mov eax, [fault_code]
    STORE 13
    mov eax, [fault_eip]
    STORE 14
    mov dword ptr [has_code], 0
    lidt [idt32_plain_ptr]
    // A busy task is not called.
    mov dword ptr [resume], offset 1f
    call SEG_MAIN:0
1:  mov eax, [vec32]
    STORE 15
    mov eax, [err32]
    STORE 16
    // IRET to a task that is not busy.
    mov word ptr [tss_main], SEG_OTHER
    mov dword ptr [resume], offset 1f
    pushfd
    or dword ptr [esp], FL_NT_BIT
    popfd
    iretd
1:  mov eax, [vec32]
    STORE 17
    mov eax, [err32]
    STORE 18
    pushfd
    and dword ptr [esp], ~FL_NT_BIT
    popfd
    // A data segment that is not there: a fault of the new task, on its stack.
    mov dword ptr [resume], offset in_bad
    jmp SEG_BAD:0
    mov eax, [vec32]
    STORE 19
    mov eax, [err32]
    STORE 20
    mov eax, [eip32]
    STORE 21
    mov eax, [tr32]
    STORE 22
    mov eax, [esp32]
    STORE 23

    ENTER_LONG
in_bad:
    jmp SEG_MAIN:0
other:
    mov [other_eax], eax
    pushfd
    pop dword ptr [other_flags]
    mov [other_esp], esp
    movzx eax, word ptr [tss_other]
    mov [other_link], eax
1:  inc dword ptr [calls]
    cmp dword ptr [jump_back], 0
    jne 2f
    iretd
    jmp 1b
2:  jmp SEG_MAIN:0
    jmp 1b
on_fault:
    mov [fault_stack], esp
    cmp dword ptr [has_code], 0
    je 1f
    pop dword ptr [fault_code]
1:  pushfd
    pop dword ptr [fault_flags]
    mov eax, [tss_main + T_EIP]
    mov [fault_eip], eax
    add dword ptr [tss_main + T_EIP], 2
    iretd
    jmp on_fault
bad:
    ud2
    .macro STUB v
stub_\v:
    push \v
    jmp common
    .endm
    STUB 10
    STUB 13
common:
    pop dword ptr ss:[vec32]
    pop dword ptr ss:[err32]
    mov eax, [esp]
    mov ss:[eip32], eax
    mov ss:[esp32], esp
    xor eax, eax
    str ax
    mov ss:[tr32], eax
    mov ax, KDS
    mov ds, ax
    mov es, ax
    // The frame without the error code is 12 bytes.
    add esp, 12
    jmp dword ptr [resume]
    LONG_AGAIN
    LOAD_TSS
    clts
    RESULT "call: eax is kept", 0, 0x2222
    RESULT "call: ebx is kept", 1, 0x3333
    RESULT "a switch sets TS", 2, CR0_TS
    RESULT "tr after the return", 3, SEG_MAIN
    RESULT "the running task is busy", 4, 0x8b
    RESULT "the other is not", 5, 0x89
    RESULT "the task goes on where it left, by a task gate", 6, 2
    RESULT "NT is clear after the return", 7, 0
    RESULT "jmp and jmp back: the other", 8, 0x89
    RESULT "jmp and jmp back: this one", 9, 0x8b
    mov eax, [other_eax]
    CHECK "its eax", rax, 0x1111
    mov eax, [other_flags]
    CHECK "its flags: NT", rax, 0x4002
    mov eax, [other_esp]
    mov edx, offset stack_other
    CHECK "its stack", rax, rdx
    mov eax, [other_link]
    CHECK "its link", rax, SEG_MAIN
    RESULT_AT "ud2 through a task gate: saved eip", 10, at_ud
    RESULT "ud2 through a task gate: NT", 11, 0x4000
    RESULT_AT "ud2 through a task gate: nothing is pushed", 12, stack_fault
    RESULT "gp through a task gate: error code", 13, 0x1f8
    RESULT_AT "gp through a task gate: saved eip", 14, at_gp
    RESULT "call of a busy task", 15, GP
    RESULT "call of a busy task: error code", 16, SEG_MAIN
    RESULT "iret to a task that is not busy", 17, TS
    RESULT "iret to a task that is not busy: error code", 18, SEG_OTHER
    RESULT "a task without its data segment", 19, TS
    RESULT "a task without its data segment: error code", 20, 0x1f8
    RESULT_AT "a task without its data segment: saved eip", 21, bad
    RESULT "a task without its data segment: tr", 22, SEG_BAD
    RESULT_AT "a task without its data segment: its stack", 23, stack_bad, 12
    ret

    .data
    .align 8
    .macro GATE to
    .word \to - 0x100000
    .word KCS32, 0x8e00, 0x10
    .endm
    .macro TASK_GATE
    .word 0, SEG_FAULT, 0x8500, 0
    .endm
idt32:
    .quad 0, 0, 0, 0, 0, 0
    TASK_GATE
    .quad 0, 0, 0, 0, 0, 0
    TASK_GATE
    .rept 18
    .quad 0
    .endr
idt32_ptr: .word . - idt32 - 1
    .long idt32
    .align 8
idt32_plain:
    .rept 10
    .quad 0
    .endr
    GATE stub_10
    .quad 0, 0
    GATE stub_13
    .rept 18
    .quad 0
    .endr
idt32_plain_ptr: .word . - idt32_plain - 1
    .long idt32_plain

    .bss
    .align 16
results: .skip 256
    .align 128
tss_main: .skip 104
    .align 128
tss_other: .skip 104
    .align 128
tss_fault: .skip 104
    .align 128
tss_bad: .skip 104
resume: .skip 4
calls: .skip 4
jump_back: .skip 4
has_code: .skip 4
vec32: .skip 4
err32: .skip 4
eip32: .skip 4
esp32: .skip 4
tr32: .skip 4
other_eax: .skip 4
other_flags: .skip 4
other_esp: .skip 4
other_link: .skip 4
fault_stack: .skip 4
fault_code: .skip 4
fault_flags: .skip 4
fault_eip: .skip 4
    .skip 4096
stack32: .skip 16
    .skip 1024
stack_other: .skip 16
    .skip 1024
stack_fault: .skip 16
    .skip 1024
stack_bad: .skip 16
