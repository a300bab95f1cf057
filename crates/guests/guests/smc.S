// Self-modifying code on one processor: after a store and a jump (which this processor family treats
// as enough) the new bytes run. Intel SDM vol. 3, 11.6 (self-modifying code), 8.1.3.
#include "berth.inc"
    .text
    .globl main
main:
    // The next instruction of the same block, its immediate.
    xor eax, eax
    mov dword ptr [1f + 1], 0x1234
1:  mov eax, 1
    CHECK "immediate of the next instruction", rax, 0x1234
    // Its opcode: nop, nop, nop -> inc ecx (ff c1) nop.
    xor ecx, ecx
    mov word ptr [1f], 0xc1ff
1:  nop
    nop
    nop
    CHECK "opcode of the next instruction", rcx, 1
    // A few instructions later, reached without any branch.
    xor ecx, ecx
    lea rdx, [1f]
    mov byte ptr [rdx + 2], 7
    add ecx, 1
    add ecx, 1
1:  add ecx, 1
    CHECK "instruction further on in the block", rcx, 9
    // The store itself is replaced by its own write: the old one completes, RIP goes on.
    lea rdi, [1f]
    mov eax, 0x90909090
1:  mov [rdi], eax
    nop
    nop
    nop
    mov eax, [rdi]
    mov edx, 0x90909090
    CHECK "instruction that overwrites itself", rax, rdx
    // A block that ran before (backwards in memory).
    call f1
    CHECK "earlier block, before", rax, 1
    mov dword ptr [f1 + 1], 2
    call f1
    CHECK "earlier block, after", rax, 2
    // A loop whose body changes itself every time: sum of 0..99.
    xor edx, edx
    xor ecx, ecx
2:  mov [3f + 2], ecx
3:  add edx, 0x7fffffff
    inc ecx
    cmp ecx, 100
    jb 2b
    CHECK "loop that rewrites its immediate", rdx, 4950
    // Branch displacement and condition.
    mov byte ptr [4f + 1], 5f - 4f - 2
    xor eax, eax
4:  jmp 6f
5:  mov eax, 5
    jmp 7f
6:  mov eax, 6
7:  CHECK "displacement of a jump", rax, 5
    xor ecx, ecx
    mov r8d, 2
8:  xor eax, eax
    cmp eax, 0
9:  je 1f
    add ecx, 1
    jmp 2f
1:  add ecx, 16
2:  xor byte ptr [9b], 1                // je <-> jne
    dec r8d
    jnz 8b
    CHECK "condition of a jump", rcx, 17
    // REP MOVSB over code that runs next, and over the code of a called function.
    mov rsi, offset image
    mov rdi, offset f2
    mov ecx, 6
    rep movsb
    call f2
    CHECK "rep movsb over a function", rax, 0x77
    mov rsi, offset image2
    mov rdi, offset 1f
    mov ecx, 5
    rep movsb
1:  mov eax, 1
    CHECK "rep movsb over the next instruction", rax, 0x99
    mov eax, 0x90
    mov rdi, offset 1f
    mov ecx, 5
    mov ebx, 3
    rep stosb
1:  mov ebx, 4
    CHECK "rep stosb over the next instruction", rbx, 3
    // Other kinds of stores: locked, SSE, PUSH, CALL's push, XSAVE-like, fstp.
    mov eax, 3
    lock xchg [f1 + 1], eax
    call f1
    CHECK "xchg into code", rax, 3
    movq xmm0, [image_q]
    movq [f1], xmm0
    call f1
    CHECK "movq into code", rax, 0x44
    mov rbx, rsp
    mov rax, [image_q2]
    mov rsp, offset f1 + 8
    push rax
    mov rsp, rbx
    call f1
    CHECK "push into code", rax, 0x55
    fild qword ptr [image_q]
    fistp qword ptr [f1]
    call f1
    CHECK "fistp into code", rax, 0x44
    lock inc dword ptr [f1 + 1]
    call f1
    CHECK "lock inc into code", rax, 0x45
    add byte ptr [f1 + 1], 1
    call f1
    CHECK "add into code", rax, 0x46
    // Store that crosses from a data page into a code page.
    mov word ptr [page2], 0x22b8
    mov dword ptr [page2 + 2], 0xc3000000
    call page2
    CHECK "code at the start of a page", rax, 0x22
    mov dword ptr [page2 - 2], 0x33b80000
    call page2
    CHECK "store crossing into the page", rax, 0x33
    // A page with code and data: the data is written in a loop while the code runs.
    mov r8, offset mixed_data
    mov ecx, 20000
    call mixed_code
    CHECK "code and data in one page: counter", "qword ptr [mixed_data]", 20000
    CHECK "code and data in one page: sum", rax, 200010000
    // The same with the code changed every 1000 rounds.
    mov qword ptr [mixed_data], 0
    xor r9d, r9d
    mov r10d, 1
1:  mov [mixed_imm + 3], r10b
    mov ecx, 1000
    call mixed_code2
    inc r10d
    cmp r10d, 11
    jb 1b
    CHECK "code changed between rounds", "qword ptr [mixed_data]", 55000
    // Data just behind code in the same cache line, and before it.
    mov ecx, 1000
1:  inc dword ptr [near_data]
    jmp 2f
near_data: .long 0
2:  loop 1b
    mov eax, [near_data]
    CHECK "data between instructions", rax, 1000
    // Code freshly written to a buffer, many times, at the same address (a JIT).
    xor ebx, ebx
    mov ecx, 1
1:  mov byte ptr [jit], 0xb8
    mov [jit + 1], ecx
    mov byte ptr [jit + 5], 0xc3
    call jit
    add rbx, rax
    inc ecx
    cmp ecx, 3000
    jbe 1b
    CHECK "3000 functions at one address", rbx, 4501500
    // Patching while single-stepping is not needed; but a fault in patched code has the new RIP.
    mov word ptr [jit], 0x0b0f
    ARM 1f
    call jit
1:  mov rsp, [fixup_rsp]
    CHECK_EXC "patched into ud2", UD, 0, jit
    ret

f1: mov eax, 1
    ret
    nop
    nop
    nop
f2: mov eax, 2
    ret
    .align 4096
page1: .skip 4096
page2: .skip 64
    .align 64
mixed_code:
    xor eax, eax
1:  inc qword ptr [r8]
    add rax, [r8]
    dec ecx
    jnz 1b
    ret
mixed_code2:
1:  mov rax, [mixed_data]
mixed_imm:
    add rax, 1
    nop
    mov [mixed_data], rax
    dec ecx
    jnz 1b
    ret
    .align 8
mixed_data: .quad 0
jit: .skip 64
    .data
image: mov eax, 0x77
    ret
image2: mov eax, 0x99
    .align 8
image_q: .byte 0xb8, 0x44, 0, 0, 0, 0xc3, 0x90, 0x10
image_q2: .byte 0xb8, 0x55, 0, 0, 0, 0xc3, 0x90, 0x10
