// Single-stepping by TF: where the #DB comes, what it saves, what suppresses it.
// Intel SDM vol. 3, 17.3.1.4 (single-step exception condition), 6.8.3 (MOV SS masks).
#include "berth.inc"
    .text
    .globl main
    // Begins stepping after the next instruction; the trap log starts empty.
    .macro STEP_ON
    mov qword ptr [steps], 0
    pushfq
    or qword ptr [rsp], FL_TF
    popfq
    .endm
    .macro STEP_OFF
    pushfq
    and qword ptr [rsp], ~FL_TF
    popfq
    .endm
main:
    mov qword ptr [hooks + DB * 8], offset on_db
    mov rax, 0xffff0ff0
    mov dr6, rax

    // The first trap comes after the instruction that follows POPF.
    STEP_ON
s1: nop
s2: nop
s3: STEP_OFF
    CHECK "first trap after the instruction behind popf", "qword ptr [log]", "offset s2"
    CHECK "second trap", "qword ptr [log + 8]", "offset s3"
    mov eax, 0xffff4ff0
    CHECK "dr6 has BS only", "qword ptr [log_dr6]", rax
    CHECK "saved rflags has TF", "qword ptr [log_tf]", FL_TF
    // POPF that clears TF: traps once more, after itself? The trap belongs to the TF before it:
    // nop, nop, pushfq, and, popfq -> five traps (17.3.1.4: TF at the start of the instruction).
    CHECK "count of traps", "qword ptr [steps]", 5

    // REP: a trap after every iteration (17.3.1.4), RIP at the instruction until it is done.
    mov ecx, 3
    mov rsi, offset src
    mov rdi, offset dst
    STEP_ON
r1: rep movsb
r2: STEP_OFF
    CHECK "rep: iteration 1", "qword ptr [log]", "offset r1"
    CHECK "rep: iteration 2", "qword ptr [log + 8]", "offset r1"
    CHECK "rep: last", "qword ptr [log + 16]", "offset r2"
    CHECK "rep: rcx at the first trap", "qword ptr [log_rcx]", 2
    CHECK "rep: rcx at the second trap", "qword ptr [log_rcx + 8]", 1
    CHECK "rep: data", "qword ptr [dst]", 0x636261
    xor ecx, ecx
    STEP_ON
r3: rep movsb
r4: STEP_OFF
    CHECK "rep with rcx 0: one trap", "qword ptr [log]", "offset r4"

    // MOV SS and POP SS hold the trap back over the next instruction.
    mov ax, ss
    STEP_ON
m1: mov ss, ax
m2: nop
m3: STEP_OFF
    CHECK "mov ss: no trap until the next instruction is done", "qword ptr [log]", "offset m3"

    // A load of DS does not.
    STEP_ON
d1: mov ds, ax
d2: nop
    STEP_OFF
    CHECK "mov ds: trap at once", "qword ptr [log]", "offset d2"

    // Taken branches, CALL and RET: RIP of the target.
    STEP_ON
    jmp b2
b1: ud2
b2: call b4
b3: jmp b5
b4: ret
b5: STEP_OFF
    CHECK "jmp", "qword ptr [log]", "offset b2"
    CHECK "call", "qword ptr [log + 8]", "offset b4"
    CHECK "ret", "qword ptr [log + 16]", "offset b3"

    // INT n clears TF after pushing RFLAGS; no trap for the INT itself, nor in the handler; the
    // trap comes after the instruction behind the return (vol. 3, 6.8.3/17.3.1.4).
    mov qword ptr [hooks + 0x85 * 8], offset on_85
    STEP_ON
i1: int 0x85
i2: nop
i3: STEP_OFF
    CHECK "int n: next trap is behind the instruction after it", "qword ptr [log]", "offset i3"
    CHECK "int n: saved rflags has TF", "qword ptr [flags85]", FL_TF

    // A fault with TF set: handler sees TF saved; the instruction itself does not trap.
    mov qword ptr [hooks + UD * 8], offset on_ud
    STEP_ON
u1: ud2
u2: nop
u3: STEP_OFF
    mov qword ptr [hooks + UD * 8], 0
    CHECK "fault: no trap for the faulting instruction", "qword ptr [log]", "offset u3"
    CHECK "fault: saved rflags has TF", "qword ptr [flags85]", FL_TF

    // CPUID, RDTSC, IN, WRMSR-like instructions that helpers may emulate trap as well.
    STEP_ON
c1: cpuid
c2: rdtsc
c3: mov rax, cr4
c4: mov cr4, rax
c5: sti
c6: cli
c7: STEP_OFF
    CHECK "cpuid", "qword ptr [log]", "offset c2"
    CHECK "rdtsc", "qword ptr [log + 8]", "offset c3"
    CHECK "mov from cr4", "qword ptr [log + 16]", "offset c4"
    CHECK "mov to cr4", "qword ptr [log + 24]", "offset c5"
    // STI delays interrupts, not single-step traps.
    CHECK "sti", "qword ptr [log + 32]", "offset c6"

    // IRET that sets TF: the trap follows the instruction at its target.
    mov qword ptr [steps], 0
    mov rax, rsp
    push KDS
    push rax
    pushfq
    or qword ptr [rsp], FL_TF
    push KCS
    push offset t1
    iretq
t1: nop
t2: STEP_OFF
    CHECK "iret: trap after the target's instruction", "qword ptr [log]", "offset t2"

    // SYSCALL at CPL 3 with TF in FMASK: masked, no trap at the entry point. SYSRET restores.
    mov ecx, MSR_STAR
    xor eax, eax
    mov edx, (0x18 | 3) << 16 | KCS
    wrmsr
    WRMSR64 MSR_LSTAR, "offset sys_entry"
    WRMSR64 MSR_FMASK, FL_TF
    mov qword ptr [steps], 0
    mov qword ptr [user_flags], 2 | FL_TF
    USER "syscall, TF masked: program ends normally", user_sys, NONE
    mov qword ptr [user_flags], 2
    CHECK "syscall, TF masked: trap behind nop", "qword ptr [log]", "offset us1"
    // SYSRET looks at the TF it has just loaded, unlike IRET: the trap comes at its target.
    CHECK "syscall, TF masked: trap at sysret's target", "qword ptr [log + 8]", "offset us2"
    CHECK "syscall, TF masked: r11 had TF", "qword ptr [r11_seen]", FL_TF | 2
    // With TF not masked the first kernel instruction is stepped (vol. 3, 17.3.1.4: SYSCALL).
    WRMSR64 MSR_FMASK, 0
    mov qword ptr [steps], 0
    mov qword ptr [user_flags], 2 | FL_TF
    USER "syscall, TF kept: program ends normally", user_sys, NONE
    mov qword ptr [user_flags], 2
    CHECK "syscall, TF kept: traps behind nop", "qword ptr [log]", "offset us1"
    // The trap after SYSCALL itself is taken at the entry point.
    CHECK "syscall, TF kept: trap at the entry point", "qword ptr [log + 8]", "offset sys_entry"
    ret

on_db:
    mov rax, [steps]
    cmp rax, 63
    ja 1f
    mov rcx, [rdi + F_RIP]
    mov [log + rax * 8], rcx
    mov rcx, [rdi + F_RCX]
    mov [log_rcx + rax * 8], rcx
    mov rcx, dr6
    mov [log_dr6 + rax * 8], rcx
    mov rcx, [rdi + F_RFLAGS]
    and ecx, FL_TF
    mov [log_tf + rax * 8], rcx
1:  inc qword ptr [steps]
    mov eax, 0xffff0ff0
    mov dr6, rax
    ret
on_ud:
    add qword ptr [rdi + F_RIP], 2
on_85:
    mov rax, [rdi + F_RFLAGS]
    and eax, FL_TF
    mov [flags85], rax
    ret
sys_entry:
    mov [r11_seen], r11
    sysretq

    USER_SECTION
user_sys:
us0: nop
us1: syscall
us2: nop
us3: int 0x80
    END_SECTION

    .data
    .align 8
src: .ascii "abcdefgh"
    .bss
    .align 8
dst: .skip 16
steps: .skip 8
flags85: .skip 8
r11_seen: .skip 8
log: .skip 64 * 8
log_rcx: .skip 64 * 8
log_dr6: .skip 64 * 8
log_tf: .skip 64 * 8
