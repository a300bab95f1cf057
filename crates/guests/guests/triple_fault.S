// A fault that cannot be delivered, nor the #DF about it: shutdown, which resets the machine.
// Intel SDM vol. 3, 6.15, interrupt 8.
#include "berth.inc"
    .text
    .globl main
main:
    mov rsi, offset text
    call puts
    lidt [empty]
    ud2
    mov rsi, offset alive
    call puts
    ret
    .data
text: .asciz "now a triple fault\n"
alive: .asciz "FAIL still running after a triple fault\n"
empty: .word 0
    .quad 0
