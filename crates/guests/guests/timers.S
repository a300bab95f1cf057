// Local APIC timer, task priority, PIT through the I/O APIC, STI shadow, HLT, interrupted strings,
// NMI blocking. Intel SDM vol. 3, 10.5.4 (timer), 10.8.3 (priority), 6.7.1 (NMI), 6.8.
#include "berth.inc"
    .text
    .globl main
#define LVT_TIMER (APIC + 0x320)
#define INIT_COUNT (APIC + 0x380)
#define CUR_COUNT (APIC + 0x390)
#define DIVIDE (APIC + 0x3e0)
#define EOI (APIC + 0xb0)
#define TPR (APIC + 0x80)
    // Waits with interrupts on until a hook has counted, at most about 2^30 cycles.
    .macro WAIT_TICKS n
    mov rdi, \n
    call wait_ticks
    .endm
main:
    mov dword ptr [APIC + 0xf0], 0x1ff
    mov dword ptr [TPR], 0
    mov dword ptr [DIVIDE], 0xb         // by 1
    mov qword ptr [hooks + 0x40 * 8], offset on_tick
    mov qword ptr [hooks + 0x51 * 8], offset on_51
    mov qword ptr [hooks + 0x61 * 8], offset on_61
    mov qword ptr [hooks + NMI * 8], offset on_nmi

    // One-shot.
    mov dword ptr [LVT_TIMER], 0x40
    mov dword ptr [INIT_COUNT], 100000000
    mov eax, [CUR_COUNT]
    test eax, eax
    setnz al
    movzx eax, al
    CHECK "one-shot: count runs", rax, 1
    WAIT_TICKS 1
    CHECK "one-shot: one interrupt", "qword ptr [ticks]", 1
    call pause_a_while
    CHECK "one-shot: only one", "qword ptr [ticks]", 1
    mov eax, [CUR_COUNT]
    CHECK "one-shot: count stays 0", rax, 0
    // HLT wakes.
    mov qword ptr [ticks], 0
    mov dword ptr [INIT_COUNT], 2000000
    sti
    hlt
s0: cli
    CHECK "hlt is left by the interrupt", "qword ptr [ticks]", 1
    CHECK "hlt: saved rip is behind it", "qword ptr [tick_rip]", "offset s0"
    // An interrupt within R12D times `step` counts; ZF: it did not come before CLI.
    .macro TICK_SOON step
    mov qword ptr [ticks], 0
    imul eax, r12d, \step
    sti
    mov [INIT_COUNT], eax
    nop
    cli
    cmp qword ptr [ticks], 0
    .endm
    // Whenever it comes, it does not come between STI and HLT.
    xor ebx, ebx
    mov r12d, 400
0:  TICK_SOON 300
    jne 2f
    sti
    hlt
h1: cli
    cmp qword ptr [tick_rip], offset h1
    je 2f
    inc ebx
2:  dec r12d
    jnz 0b
    CHECK "sti, hlt: never in between", rbx, 0
    // POPFQ has no shadow.
    xor ebx, ebx
    mov r12d, 400
0:  TICK_SOON 100
    jne 2f
1:  test dword ptr [APIC + 0x220], 1    // in the IRR
    jz 1b
    push 0xa02 | FL_DF
    popfq
h2: pushfq
    cli
    cld
    pop rax
    and eax, 0xfff
    cmp eax, 0xa02 | FL_DF
    jne 3f
    cmp qword ptr [tick_rip], offset h2
    je 2f
3:  inc ebx
2:  dec r12d
    jnz 0b
    CHECK "popfq: the interrupt comes at once, flags kept", rbx, 0
    // Periodic.
    mov qword ptr [ticks], 0
    mov dword ptr [LVT_TIMER], 0x20040
    mov dword ptr [INIT_COUNT], 500000
    WAIT_TICKS 5
    mov dword ptr [INIT_COUNT], 0
    mov rax, [ticks]
    cmp rax, 5
    setae al
    movzx eax, al
    CHECK "periodic: keeps coming", rax, 1
    mov qword ptr [ticks], 0
    call pause_a_while
    mov rax, [ticks]
    cmp rax, 1
    setbe al
    movzx eax, al
    CHECK "periodic: initial count 0 stops it", rax, 1
    // Masked.
    mov qword ptr [ticks], 0
    mov dword ptr [LVT_TIMER], 0x10040
    mov dword ptr [INIT_COUNT], 1000
    call pause_a_while
    CHECK "masked: no interrupt", "qword ptr [ticks]", 0
    mov eax, [CUR_COUNT]
    CHECK "masked: it still counts", rax, 0
    // IF clear holds it back; IRR shows it.
    mov dword ptr [LVT_TIMER], 0x40
    mov dword ptr [INIT_COUNT], 1000
    call wait_irr_40
    CHECK "IF clear: pending in IRR", rax, 1
    CHECK "IF clear: not taken", "qword ptr [ticks]", 0
    // STI shadow: the instruction after STI still runs before it.
    xor eax, eax
    mov qword ptr [tick_rip], 0
    sti
    inc eax
s1: inc eax
    inc eax
    cli
    CHECK "sti: taken behind the next instruction", "qword ptr [tick_rip]", "offset s1"
    CHECK "sti: one interrupt", "qword ptr [ticks]", 1
    // STI; CLI: never taken between.
    mov dword ptr [INIT_COUNT], 1000
    call wait_irr_40
    mov qword ptr [ticks], 0
    sti
    cli
    nop
    nop
    CHECK "sti; cli: not taken", "qword ptr [ticks]", 0
    // MOV SS shadow with IF set by POPF... STI; MOV SS extends over one more only for SS.
    mov eax, ss
    sti
    mov ss, eax
s2: nop
s3: nop
    cli
    mov rax, [tick_rip]
    mov edx, offset s2
    sub rax, rdx
    cmp rax, 1
    setbe al
    movzx eax, al
    CHECK "sti; mov ss: taken at or behind the next", rax, 1
    CHECK "sti; mov ss: one interrupt", "qword ptr [ticks]", 1
    // POPF and IRET that set IF have no shadow.
    mov dword ptr [INIT_COUNT], 1000
    call wait_irr_40
    push 0x202
    popfq
s4: nop
    nop
    cli
    CHECK "popf: taken at once", "qword ptr [tick_rip]", "offset s4"
    // STI's shadow is over after one instruction, also when that jumps to itself.
    mov qword ptr [ticks], 0
    mov dword ptr [INIT_COUNT], 1000
    call wait_irr_40
    mov qword ptr [leave_to], offset s6
    sti
s5: jmp s5
s6: cli
    CHECK "sti; jmp to itself: one interrupt", "qword ptr [ticks]", 1
    CHECK "sti; jmp to itself: where", "qword ptr [tick_rip]", "offset s5"

    // TPR holds back vectors of its class and below.
    mov qword ptr [ticks], 0
    mov dword ptr [TPR], 0x40
    mov dword ptr [INIT_COUNT], 1000
    sti
    call pause_a_while
    CHECK "tpr 0x40 holds 0x40 back", "qword ptr [ticks]", 0
    mov dword ptr [TPR], 0x3f
    call pause_a_while
    cli
    CHECK "tpr 0x3f lets it through", "qword ptr [ticks]", 1
    mov eax, 5
    mov cr8, rax
    mov eax, [TPR]
    CHECK "cr8 is tpr bits 7:4", rax, 0x50
    mov dword ptr [TPR], 0x70
    mov rax, cr8
    CHECK "tpr shows in cr8", rax, 7
    xor eax, eax
    mov cr8, rax

    // In service: without EOI equal and lower classes wait, higher ones come through.
    mov qword ptr [order_n], 0
    mov qword ptr [c51], 0
    mov qword ptr [c61], 0
    sti
    mov dword ptr [APIC + 0x300], 0x00044051    // self IPI 0x51, whose hook does no EOI
    call pause_a_while
    mov dword ptr [APIC + 0x300], 0x00044051
    mov dword ptr [APIC + 0x300], 0x00044061
    call pause_a_while
    cli
    CHECK "in service: same class waits", "qword ptr [c51]", 1
    CHECK "in service: higher class comes through", "qword ptr [c61]", 1
    mov eax, [APIC + 0x100 + 0x20]              // ISR 0x40..0x5f
    shr eax, 0x11
    and eax, 1
    CHECK "in service: ISR bit", rax, 1
    mov eax, [APIC + 0xa0]
    CHECK "in service: PPR", rax, 0x50
    mov dword ptr [EOI], 0
    sti
    call pause_a_while
    cli
    CHECK "eoi: the waiting one comes", "qword ptr [c51]", 2
    mov dword ptr [EOI], 0
    mov eax, [APIC + 0xa0]
    CHECK "eoi: PPR is 0 again", rax, 0
    // Two pending: the higher vector first.
    mov qword ptr [order], 0
    mov dword ptr [APIC + 0x300], 0x00044051
    mov dword ptr [APIC + 0x300], 0x00044061
    mov qword ptr [order_n], 0
    sti
    call pause_a_while
    cli
    mov dword ptr [EOI], 0
    mov ax, [order]
    movzx eax, ax
    CHECK "two pending: higher first", rax, 0x5161

    // Interrupts during REP MOVSB: it is resumed and the copy is complete.
    mov qword ptr [ticks], 0
    mov dword ptr [LVT_TIMER], 0x20040
    mov dword ptr [INIT_COUNT], 20000
    sti
    mov r8d, 2000
1:  mov rsi, offset copy_src
    mov rdi, offset copy_dst
    mov ecx, 65536
    mov [copy_src + 65535], r8b
rep_begin:
    rep movsb
    cmp [copy_dst + 65535], r8b
    jne 2f
    dec r8d
    jnz 1b
2:  cli
    mov dword ptr [INIT_COUNT], 0
    mov dword ptr [LVT_TIMER], 0x10040
    CHECK "rep movsb under interrupts: all rounds right", r8, 0
    mov rax, [rep_ticks]
    test rax, rax
    setnz al
    movzx eax, al
    CHECK "rep movsb under interrupts: some in the middle", rax, 1
    CHECK "rep movsb under interrupts: registers exact", "qword ptr [rep_wrong]", 0
    mov rax, [ticks]
    test rax, rax
    setnz al
    movzx eax, al
    CHECK "rep movsb under interrupts: there were some", rax, 1
    sti
    nop
    nop
    cli

    // NMI: comes with IF clear; a second one waits until IRET (6.7.1).
    mov qword ptr [nmis], 0
    mov dword ptr [APIC + 0x300], 0x00044400
    nop
    nop
    call pause_a_while
    CHECK "nmi: taken with IF clear; a nested one waits for iret", "qword ptr [nmi_depth_max]", 1
    CHECK "nmi: the second follows the first", "qword ptr [nmis]", 2

    // PIT channel 0 through the I/O APIC: pin 2 (or 0).
    mov qword ptr [ticks], 0
    mov dword ptr [IOAPIC], 0x10 + 4
    mov dword ptr [IOAPIC + 0x10], 0x40
    mov dword ptr [IOAPIC], 0x11 + 4
    mov eax, [APIC + 0x20]
    and eax, 0xff000000
    mov [IOAPIC + 0x10], eax
    mov al, 0x34                        // channel 0, mode 2, 1 kHz
    out 0x43, al
    mov al, 1193 & 0xff
    out 0x40, al
    mov al, 1193 >> 8
    out 0x40, al
    WAIT_TICKS 5
    mov rax, [ticks]
    cmp rax, 5
    setae al
    movzx eax, al
    CHECK "pit through i/o apic pin 2", rax, 1
    mov dword ptr [IOAPIC], 0x10 + 4
    mov dword ptr [IOAPIC + 0x10], 0x10040
    mov eax, [IOAPIC + 0x10]
    test eax, 0x10000
    setnz al
    movzx eax, al
    CHECK "i/o apic entry masked reads back", rax, 1
    mov dword ptr [IOAPIC], 1
    mov eax, [IOAPIC + 0x10]
    shr eax, 16
    and eax, 0xff
    cmp eax, 15
    setae al
    movzx eax, al
    CHECK "i/o apic has at least 16 entries", rax, 1

    // TSC deadline (CPUID.1:ECX bit 24).
    mov eax, 1
    cpuid
    bt ecx, 24
    jnc 1f
    mov qword ptr [ticks], 0
    mov dword ptr [LVT_TIMER], 0x40040
    mfence
    rdtsc
    shl rdx, 32
    or rax, rdx
    add rax, 1000000
    mov [deadline], rax
    WRMSR64 MSR_TSC_DEADLINE, "[deadline]"
    WAIT_TICKS 1
    CHECK "tsc deadline: interrupt", "qword ptr [ticks]", 1
    rdtsc
    shl rdx, 32
    or rax, rdx
    cmp rax, [deadline]
    setae al
    movzx eax, al
    CHECK "tsc deadline: not early", rax, 1
    RDMSR64 MSR_TSC_DEADLINE
    CHECK "tsc deadline: msr reads 0 afterwards", rax, 0
    WRMSR64 MSR_TSC_DEADLINE, 1
    WAIT_TICKS 2
    CHECK "tsc deadline in the past: at once", "qword ptr [ticks]", 2
    mov dword ptr [LVT_TIMER], 0x10040
    jmp 2f
1:  SKIP "tsc deadline: interrupt", "not advertised"
    SKIP "tsc deadline: not early", "not advertised"
    SKIP "tsc deadline: msr reads 0 afterwards", "not advertised"
    SKIP "tsc deadline in the past: at once", "not advertised"
2:  // x2APIC (CPUID.1:ECX bit 21).
    mov eax, 1
    cpuid
    bt ecx, 21
    jnc 1f
    mov r8d, [APIC + 0x20]
    shr r8d, 24
    RDMSR64 MSR_APIC_BASE
    bts eax, 10
    wrmsr
    RDMSR64 0x802
    CHECK "x2apic: id", rax, r8
    mov qword ptr [x2], 1
    mov qword ptr [ticks], 0
    WRMSR64 0x838, 0
    WRMSR64 0x832, 0x40
    WRMSR64 0x838, 100000
    WAIT_TICKS 1
    CHECK "x2apic: timer", "qword ptr [ticks]", 1
    mov ecx, 0x83f                      // SELF IPI
    mov eax, 0x40
    xor edx, edx
    wrmsr
    WAIT_TICKS 2
    CHECK "x2apic: self ipi", "qword ptr [ticks]", 2
    mov ecx, 0x802
    xor eax, eax
    xor edx, edx
    FAULT "x2apic: id is read only", GP, 0, wrmsr
    mov ecx, 0x80b
    mov eax, 1
    FAULT "x2apic: EOI must be 0", GP, 0, wrmsr
    mov ecx, 0x80e
    FAULT "x2apic: no DFR", GP, 0, rdmsr
    ret
1:  SKIP "x2apic: id", "not advertised"
    SKIP "x2apic: timer", "not advertised"
    SKIP "x2apic: self ipi", "not advertised"
    SKIP "x2apic: id is read only", "not advertised"
    SKIP "x2apic: EOI must be 0", "not advertised"
    SKIP "x2apic: no DFR", "not advertised"
    ret

on_tick:
    inc qword ptr [ticks]
    mov rax, [rdi + F_RIP]
    mov [tick_rip], rax
    cmp qword ptr [leave_to], 0
    je 1f
    mov rcx, [leave_to]
    mov [rdi + F_RIP], rcx
    mov qword ptr [leave_to], 0
1:  cmp rax, offset rep_begin
    jne 3f
    // RSI and RDI have gone as far as RCX says.
    mov rax, 65536
    sub rax, [rdi + F_RCX]
    jz 3f
    inc qword ptr [rep_ticks]
    mov rcx, [rdi + F_RSI]
    sub rcx, offset copy_src
    cmp rcx, rax
    jne 2f
    mov rcx, [rdi + F_RDI]
    sub rcx, offset copy_dst
    cmp rcx, rax
    je 3f
2:  inc qword ptr [rep_wrong]
3:  cmp qword ptr [x2], 0
    jne 1f
    mov dword ptr [EOI], 0
    ret
1:  mov ecx, 0x80b
    xor eax, eax
    xor edx, edx
    wrmsr
    ret
on_51:
    inc qword ptr [c51]
    mov al, 0x51
    jmp 1f
on_61:
    inc qword ptr [c61]
    mov dword ptr [EOI], 0
    mov al, 0x61
1:  mov rcx, [order_n]
    and ecx, 7
    mov [order + rcx], al
    inc qword ptr [order_n]
    ret
on_nmi:
    inc qword ptr [nmis]
    inc qword ptr [nmi_depth]
    mov rax, [nmi_depth]
    cmp rax, [nmi_depth_max]
    jbe 1f
    mov [nmi_depth_max], rax
1:  cmp qword ptr [nmis], 1
    jne 2f
    mov dword ptr [APIC + 0x300], 0x00044400 // must wait: we have not done IRET
    mov ecx, 100000
1:  pause
    loop 1b
2:  dec qword ptr [nmi_depth]
    ret

wait_ticks:
    sti
    mov rcx, 1 << 28
1:  pause
    cmp [ticks], rdi
    jae 2f
    dec rcx
    jnz 1b
2:  cli
    ret
pause_a_while:
    mov ecx, 3000000
1:  dec ecx
    jnz 1b
    ret
wait_irr_40:                            // RAX: 1 when vector 0x40 is pending
    mov ecx, 10000000
1:  mov eax, [APIC + 0x200 + 0x20]
    and eax, 1
    jnz 2f
    dec ecx
    jnz 1b
2:  ret
    .bss
    .align 64
ticks: .skip 8
leave_to: .skip 8
tick_rip: .skip 8
c51: .skip 8
c61: .skip 8
order: .skip 8
order_n: .skip 8
nmis: .skip 8
nmi_depth: .skip 8
nmi_depth_max: .skip 8
deadline: .skip 8
x2: .skip 8
rep_ticks: .skip 8
rep_wrong: .skip 8
copy_src: .skip 65536
copy_dst: .skip 65536
