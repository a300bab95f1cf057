// Breakpoint registers. Intel SDM vol. 3, 17.2 (DR4/5, DR6, DR7), 17.3.1.
#include "berth.inc"
    .text
    .globl main
    .macro DR7_ val
    mov eax, \val
    mov dr7, rax
    .endm
    // WATCH name, dr6 (B bits; 0: no trap), insn: trap after the instruction
    .macro WATCH name, bits, insn:vararg
    mov qword ptr [hits], 0
    mov qword ptr [hit_dr6], 0
    \insn
.Lnext\@: nop
    mov r9, [hit_dr6]
    and r9d, 0xf
    CHECK "\name", r9, \bits
    .if \bits != 0
    CHECK "\name: rip", "qword ptr [hit_rip]", "offset .Lnext\@"
    CHECK "\name: once", "qword ptr [hits]", 1
    .endif
    .endm
#define LEN1 0
#define LEN2 1
#define LEN8 2
#define LEN4 3
#define CTL(n, rw, len) (((rw) | (len) << 2) << (16 + 4 * (n)) | 2 << (2 * (n)) | 0x400)
main:
    mov qword ptr [hooks + DB * 8], offset on_db
    mov rax, 0xffff0ff0
    mov dr6, rax
    mov rbx, offset data
    mov dr0, rbx
    lea rax, [rbx + 16]
    mov dr1, rax
    mov rax, dr0
    CHECK "dr0 reads back", rax, rbx
    mov rax, dr7
    CHECK "dr7 after reset", rax, 0x400
    mov rax, dr6
    mov edx, 0xffff0ff0
    CHECK "dr6 fixed bits", rax, rdx
    xor eax, eax
    mov dr6, rax
    mov rax, dr6
    CHECK "dr6: reserved ones stay", rax, rdx
    DR7_ 0x300
    mov rax, dr7
    CHECK "dr7: bit 10 is one", rax, 0x700
    DR7_ 0

    // Data watchpoints: write, length.
    DR7_ CTL(0,1,LEN4)
    WATCH "write 4: dword store", 1, mov [rbx], eax
    WATCH "write 4: read", 0, mov eax, [rbx]
    WATCH "write 4: byte inside", 1, mov [rbx + 3], al
    WATCH "write 4: byte behind", 0, mov [rbx + 4], al
    WATCH "write 4: byte before", 0, mov [rbx - 1], al
    WATCH "write 4: qword that covers it", 1, mov [rbx - 4], rax
    WATCH "write 4: qword that ends before", 0, mov [rbx - 8], rax
    WATCH "write 4: read-modify-write", 1, inc dword ptr [rbx]
    WATCH "write 4: locked", 1, lock xadd [rbx], eax
    WATCH "write 4: cmp does not write", 0, cmp [rbx], eax
    WATCH "write 4: movups", 1, movups [rbx - 8], xmm0
    DR7_ CTL(0,1,LEN1)
    WATCH "write 1: neighbour byte", 0, mov [rbx + 1], al
    WATCH "write 1: dword over it", 1, mov [rbx - 3], eax
    DR7_ CTL(0,1,LEN2)
    WATCH "write 2: second byte", 1, mov [rbx + 1], al
    WATCH "write 2: third byte", 0, mov [rbx + 2], al
    DR7_ CTL(0,1,LEN8)
    WATCH "write 8: last byte", 1, mov [rbx + 7], al
    WATCH "write 8: behind", 0, mov [rbx + 8], al
    DR7_ CTL(0,3,LEN4)
    WATCH "read/write 4: read", 1, mov eax, [rbx]
    WATCH "read/write 4: write", 1, mov [rbx], eax
    WATCH "read/write 4: push m", 1, push [rbx]
    pop rax
    WATCH "read/write 4: elsewhere", 0, mov eax, [rbx + 8]
    // I/O breakpoints, with CR4.DE only (17.2.4); 0x80 is a port without effect.
    mov rax, cr4
    bts rax, 3
    mov cr4, rax
    mov eax, 0x80
    mov dr0, rax
    DR7_ CTL(0,2,LEN1)
    WATCH "port: out", 1, out 0x80, al
    WATCH "port: in", 1, in al, 0x80
    WATCH "port: word that covers it", 1, out 0x7f, ax
    WATCH "port: the next one", 0, out 0x81, al
    WATCH "port: memory at the same address", 0, mov al, [0x80]
    mov edx, 0x80
    mov rsi, rbx
    WATCH "port: outsb", 1, outsb
    mov rax, cr4
    btr rax, 3
    mov cr4, rax
    mov dr0, rbx
    // Address not aligned to the length: low bits are ignored (17.2.5).
    lea rax, [rbx + 2]
    mov dr0, rax
    DR7_ CTL(0,1,LEN4)
    WATCH "unaligned address: low bits ignored", 1, mov [rbx], al
    mov dr0, rbx
    // Two at once.
    DR7_ (CTL(0,1,LEN8) | CTL(1,1,LEN8))
    lea rax, [rbx + 8]
    mov dr1, rax
    WATCH "two watchpoints by one store", 3, movups [rbx], xmm0
    lea rax, [rbx + 16]
    mov dr1, rax
    // Local enable bit works alike; disabled does not trap.
    DR7_ 0x10401
    WATCH "local enable", 1, mov [rbx], al
    DR7_ 0x10400
    WATCH "not enabled", 0, mov [rbx], al
    // REP: traps between iterations.
    DR7_ CTL(1,1,LEN1)
    mov qword ptr [hits], 0
    lea rdi, [rbx + 14]
    mov ecx, 5
    rep stosb
    CHECK "rep stosb over a watchpoint: one hit", "qword ptr [hits]", 1
    CHECK "rep stosb: rcx at the hit", "qword ptr [hit_rcx]", 2
    // Stack push over a watchpoint; the CPU's own pushes of an exception frame do not count here.
    DR7_ CTL(0,1,LEN8)
    mov r8, rsp
    lea rsp, [rbx + 8]
    push rax
    mov rsp, r8
    mov r9, [hit_dr6]
    and r9d, 0xf
    CHECK "push onto a watchpoint", r9, 1
    DR7_ 0

    // Instruction breakpoints: fault before the instruction; RF set by the handler lets it run.
    mov rax, offset b1
    mov dr2, rax
    mov qword ptr [hits], 0
    DR7_ CTL(2,0,LEN1)
    xor eax, eax
b0: nop
b1: inc eax
b2: nop
    mov r9, [hit_dr6]
    and r9d, 0xf
    CHECK "exec: bit", r9, 4
    CHECK "exec: rip", "qword ptr [hit_rip]", "offset b1"
    CHECK "exec: once, with RF", "qword ptr [hits]", 1
    CHECK "exec: instruction ran once", rax, 1
    mov r9, [hit_flags]
    and r9d, FL_RF
    // Not set by the processor for this one fault (vol. 3, 17.3.1.1): that is the handler's job.
    CHECK "exec: no RF in the saved flags", r9, 0
    // In a loop it hits each time.
    mov qword ptr [hits], 0
    mov rax, offset b5
    mov dr2, rax
    mov ecx, 3
b5: nop
    loop b5
    CHECK "exec: each iteration", "qword ptr [hits]", 3
    // A REP instruction hits once before the first iteration, as RF stays set between.
    mov qword ptr [hits], 0
    mov rax, offset b6
    mov dr2, rax
    lea rdi, [rbx + 32]
    mov ecx, 4
b6: rep stosb
    CHECK "exec: rep instruction hits once", "qword ptr [hits]", 1
    CHECK "exec: rep instruction completes", rcx, 0
    // MOV SS holds an instruction breakpoint back (6.8.3).
    mov qword ptr [hits], 0
    mov rax, offset b7
    mov dr2, rax
    mov eax, ss
    mov ss, eax
b7: nop
    CHECK "exec: held back by mov ss", "qword ptr [hits]", 0
    // Length other than 1 for exec is undefined; address in the middle never hits.
    mov qword ptr [hits], 0
    mov rax, offset b8 + 1
    mov dr2, rax
b8: mov eax, 0x12345678
    CHECK "exec: middle of an instruction", "qword ptr [hits]", 0
    DR7_ 0

    // Single-step together with an instruction breakpoint at the next instruction: BS first, then the
    // breakpoint is a fault of the next instruction (table 6-2).
    mov rax, offset c1
    mov dr2, rax
    mov qword ptr [hits], 0
    DR7_ CTL(2,0,LEN1)
    mov qword ptr [clear_tf], 1
    pushfq
    or qword ptr [rsp], FL_TF
    popfq
    nop
c1: nop
    mov qword ptr [clear_tf], 0
    DR7_ 0
    mov r9, [hit_dr6]
    mov r10, [hits]
    mov rax, [first_dr6]
    and eax, 0x4000
    CHECK "step before breakpoint: BS", rax, 0x4000
    and r9d, 4
    CHECK "step before breakpoint: B2 follows or comes along", r9, 4

    // GD: an access to a debug register faults with BD, before any change.
    mov qword ptr [hooks + DB * 8], 0
    mov eax, 0x2400
    mov dr7, rax
    FAULT "gd: mov to dr0", DB, 0, mov dr0, rax
    mov rax, [exc_dr6]
    and eax, 0x600f
    CHECK "gd: BD", rax, 0x2000
    mov rax, dr7
    CHECK "gd: cleared on entry to the handler", rax, 0x400
    mov eax, 0x2400
    mov dr7, rax
    FAULT "gd: mov from dr6", DB, 0, mov rax, dr6
    // CR4.DE: DR4 and DR5 alias DR6 and DR7, or #UD.
    DR7_ 0x400
    FINE "de clear: mov from dr4", mov rax, dr4
    mov rdx, dr6
    CHECK "de clear: dr4 is dr6", rax, rdx
    FINE "de clear: mov from dr5", mov rax, dr5
    CHECK "de clear: dr5 is dr7", rax, 0x400
    mov rax, cr4
    bts rax, 3
    mov cr4, rax
    FAULT "de set: mov from dr4", UD, 0, mov rax, dr4
    FAULT "de set: mov to dr5", UD, 0, mov dr5, rax
    // CPL 3 watchpoint: the address is linear, all levels see it.
    mov rax, offset udata
    mov dr3, rax
    DR7_ CTL(3,1,LEN4)
    USER_SECTION
u_w: mov dword ptr [udata], 5
u_w1: int 0x80
    .align 8
udata: .quad 0
    END_SECTION
    USER "watchpoint hit at CPL 3", u_w, DB, 0, u_w1
    mov rax, [exc_dr6]
    and eax, 0x600f
    CHECK "watchpoint hit at CPL 3: B3", rax, 8
    CHECK "watchpoint hit at CPL 3: the store was done", "qword ptr [udata]", 5
    DR7_ 0
    ret

on_db:
    mov rax, dr6
    cmp qword ptr [hits], 0
    jne 1f
    mov [first_dr6], rax
1:  inc qword ptr [hits]
    mov [hit_dr6], rax
    mov eax, 0xffff0ff0
    mov dr6, rax
    mov rax, [rdi + F_RIP]
    mov [hit_rip], rax
    mov rax, [rdi + F_RCX]
    mov [hit_rcx], rax
    mov rax, [rdi + F_RFLAGS]
    mov [hit_flags], rax
    test byte ptr [hit_dr6], 4
    jz 1f
    or qword ptr [rdi + F_RFLAGS], FL_RF
    cmp qword ptr [clear_tf], 0
    je 1f
    and qword ptr [rdi + F_RFLAGS], ~FL_TF
1:  ret
    .bss
    .align 64
    .skip 64
data: .skip 128
hits: .skip 8
hit_dr6: .skip 8
first_dr6: .skip 8
hit_rip: .skip 8
hit_rcx: .skip 8
hit_flags: .skip 8
clear_tf: .skip 8
