// IN, OUT, INS, OUTS at CPL 3 by IOPL and the I/O permission bitmap.
// Intel SDM vol. 1, 18.5 (protected-mode I/O); vol. 2, IN.
#include "berth.inc"
    .text
    .globl main
#define PORT 0x80                       /* the diagnostic port: writing is harmless */
main:
    .macro IO name, iopl, port, vec, insn:vararg
    USER_SECTION
.Lu\@: \insn
    int 0x80
    END_SECTION
    mov qword ptr [user_flags], 2 | \iopl << 12
    mov edx, \port
    mov rdi, offset .Lu\@
    call call_user
    .if \vec == GP
    CHECK_EXC "\name", GP, 0, .Lu\@
    .else
    CHECK_EXC "\name", \vec, 0
    .endif
    .endm
    IO "iopl 0, no bitmap: out", 0, PORT, GP, out dx, al
    IO "iopl 1, no bitmap: out", 1, PORT, GP, out dx, al
    IO "iopl 2, no bitmap: out", 2, PORT, GP, out dx, al
    IO "iopl 3, no bitmap: out", 3, PORT, NONE, out dx, al
    IO "iopl 3, no bitmap: out imm", 3, PORT, NONE, out PORT, al
    // Bitmap behind the TSS: offset 104, every port refused, then single bits cleared.
    mov rdi, offset io_bitmap
    mov ecx, 8193
    mov al, 0xff
    rep stosb
    mov rax, offset io_bitmap
    sub rax, offset tss
    mov [tss + 102], ax
    mov rdi, offset gdt + TSS_SEL
    mov rdx, rax
    add edx, 8192
    mov rax, offset tss
    mov ecx, 0x89
    call make_system_descriptor
    mov ax, TSS_SEL
    ltr ax
    IO "bit set: out", 0, PORT, GP, out dx, al
    btr dword ptr [io_bitmap + 0x80 / 8], 0
    IO "bit clear: out dx, al", 0, PORT, NONE, out dx, al
    IO "bit clear: out imm", 0, PORT, NONE, out PORT, al
    IO "bit clear: in", 0, PORT, NONE, in al, dx
    IO "second bit of a word set", 0, PORT, GP, out dx, ax
    btr dword ptr [io_bitmap + 0x80 / 8], 1
    IO "both bits of a word clear", 0, PORT, NONE, out dx, ax
    IO "third bit of a dword set", 0, PORT, GP, out dx, eax
    btr dword ptr [io_bitmap + 0x80 / 8], 2
    btr dword ptr [io_bitmap + 0x80 / 8], 3
    IO "four bits clear", 0, PORT, NONE, out dx, eax
    IO "neighbour port", 0, 0x84, GP, out dx, al
    IO "neighbour below", 0, 0x7f, GP, out dx, al
    // Last ports: the processor reads two bytes of the bitmap, so a byte of ones is needed behind.
    and byte ptr [io_bitmap + 8191], 0x7f
    IO "port 0xffff, bit clear", 0, 0xffff, NONE, in al, dx
    IO "port 0xffff, word: its second bit is the byte of ones", 0, 0xffff, GP, in ax, dx
    // String forms.
    mov rsi, offset user_stack_top - 64
    IO "outsb, bit clear", 0, PORT, NONE, outsb
    mov rsi, offset user_stack_top - 64
    IO "outsb, bit set", 0, 0x88, GP, outsb
    // The limit of the TSS cuts the bitmap: ports beyond it are refused.
    mov rdi, offset gdt + TSS_SEL
    mov rax, offset io_bitmap
    mov rdx, offset tss
    sub rax, rdx
    mov edx, eax
    add edx, PORT / 8                   // the byte of the port is inside, the next is not
    mov rax, offset tss
    mov ecx, 0x89
    call make_system_descriptor
    mov ax, TSS_SEL
    ltr ax
    mov byte ptr [io_bitmap + 0x78 / 8], 0
    IO "second byte of the bitmap beyond the limit", 0, PORT, GP, out dx, al
    IO "both bytes within the limit", 0, 0x78, NONE, in al, dx
    ret
