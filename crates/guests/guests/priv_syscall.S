// SYSCALL/SYSRET, SYSENTER/SYSEXIT, SWAPGS, FS/GS bases, TSD, RDPMC, UMIP.
// Intel SDM vol. 2 for each instruction; vol. 3, 5.8.
#include "berth.inc"
    .text
    .globl main
main:
    mov ecx, MSR_STAR
    xor eax, eax
    mov edx, (0x18 | 3) << 16 | KCS
    wrmsr
    WRMSR64 MSR_LSTAR, "offset entry"
    WRMSR64 MSR_FMASK, 0x47700          // what Linux masks: TF IF DF IOPL NT AC
    WRMSR64 MSR_CSTAR, "offset se_entry"
    // SYSCALL from CPL 3.
    mov qword ptr [user_flags], 0x40603 // AC DF IF CF
    USER "syscall: program ends normally", u_call, NONE
    mov qword ptr [user_flags], 2
    CHECK "syscall: rcx is the next rip", "qword ptr [seen_rcx]", "offset u_next"
    CHECK "syscall: r11 is rflags", "qword ptr [seen_r11]", 0x40603
    CHECK "syscall: rflags masked", "qword ptr [seen_flags]", 3
    CHECK "syscall: cs", "qword ptr [seen_cs]", KCS
    CHECK "syscall: ss", "qword ptr [seen_ss]", KDS
    CHECK "syscall: rsp is not changed", "qword ptr [seen_rsp]", "offset user_stack_top"
    CHECK "sysretq: rflags from r11", "qword ptr [exc_rflags]", 0x40603
    CHECK "sysretq: cs", "qword ptr [exc_cs]", UCS64
    CHECK "sysretq: ss", "qword ptr [exc_ss]", UDS
    // SYSRET ignores RF, VM and reserved bits of R11.
    ARM 1f
    mov r11d, 0x30cd7                   // RF and VM set
    mov rcx, offset user_done
    mov rsp, offset user_stack_top
    sysretq
1:  CHECK_EXC "sysretq: ends in the program", NONE, 0
    mov rax, [exc_rflags]
    CHECK "sysretq: RF and VM are not loaded", rax, 0x0cd7
    // SYSRET to 32 bits: CS from STAR without the 16, EIP 32 bits.
    ARM 1f
    mov r11d, 2
    mov rcx, 0xdead00000000
    mov eax, offset u32_done
    or rcx, rax
    mov rsp, offset user_stack_top
    sysretd
1:  CHECK_EXC "sysretl: ends in the program", NONE, 0, u32_next
    CHECK "sysretl: cs", "qword ptr [exc_cs]", UCS32
    CHECK "sysretl: ss", "qword ptr [exc_ss]", UDS
    // A non-canonical RCX: #GP at the SYSRET, at CPL 0 (vol. 2, SYSRET).
    mov rcx, 0x0000800000000000
    mov r11d, 2
    FAULT "sysretq: non-canonical rcx", GP, 0, sysretq
    CHECK "sysretq: that fault is at CPL 0", "qword ptr [exc_cs]", KCS
    // SYSCALL in 64-bit kernel mode works as well; RCX, R11.
    push 0x203
    popfq
    cli
    syscall
k_next:                                 // the entry jumps back here
    CHECK "syscall at CPL 0: rcx", "qword ptr [seen_rcx]", "offset k_next"
    // Many in a row, from the same place to the same place; then to another one.
    WRMSR64 MSR_FMASK, 0x257fd5         // what Linux masks since 5.16
    WRMSR64 MSR_LSTAR, "offset g_entry"
    USER "many system calls", u_gates, NONE
    WRMSR64 MSR_LSTAR, "offset g_entry_2"
    USER "many system calls to another entry", u_gates, NONE
    CHECK "many system calls: number", "qword ptr [g_count]", 300
    CHECK "many system calls to another entry: number", "qword ptr [g_count_2]", 300
    CHECK "many system calls: flags and segments in the kernel", "qword ptr [g_bad]", 0
    mov rcx, 0x0000800000000000
    mov r11d, 2
    FAULT "sysretq: non-canonical rcx after many", GP, 0, sysretq
    WRMSR64 MSR_FMASK, 0x47000          // IF, DF, TF stay
    mov qword ptr [user_flags], 0x403
    WRMSR64 MSR_LSTAR, "offset entry"
    USER "syscall with less masked", u_call, NONE
    mov qword ptr [user_flags], 2
    CHECK "syscall with less masked: rflags", "qword ptr [seen_flags]", 0x403
    // EFER.SCE clear: #UD for both.
    RDMSR64 MSR_EFER
    btr eax, 0
    wrmsr
    FAULT "syscall with SCE clear", UD, 0, syscall
    FAULT "sysret with SCE clear", UD, 0, sysretq
    USER "cpl 3: syscall with SCE clear", u_call, UD, 0, u_call
    RDMSR64 MSR_EFER
    bts eax, 0
    wrmsr

    // SYSENTER/SYSEXIT. CS is SYSENTER_CS, SS +8; SYSEXIT: CS +16 (32-bit) or +32, SS after it.
    xor eax, eax
    xor edx, edx
    mov ecx, MSR_SYSENTER_CS
    wrmsr
    FAULT "sysenter with SYSENTER_CS 0", GP, 0, sysenter
    FAULT "sysexit with SYSENTER_CS 0", GP, 0, .byte 0x48, 0x0f, 0x35
    WRMSR64 MSR_SYSENTER_CS, KCS
    WRMSR64 MSR_SYSENTER_ESP, "offset rsp0_top"
    WRMSR64 MSR_SYSENTER_EIP, "offset se_entry"
    // from 64-bit code
    mov qword ptr [user_flags], 0x602
    mov rdi, offset u_sysenter
    ARM 1f
    push UDS
    push offset user_stack_top
    push 0x602
    push UCS64
    push rdi
    iretq
1:  CHECK_EXC "sysenter from 64-bit code: comes to the entry", NONE, 0
    CHECK "sysenter: rip", "qword ptr [exc_rip]", "offset se_next"
    CHECK "sysenter: cs", "qword ptr [exc_cs]", KCS
    CHECK "sysenter: ss", "qword ptr [exc_ss]", KDS
    CHECK "sysenter: rsp", "qword ptr [exc_rsp]", "offset rsp0_top"
    CHECK "sysenter: IF cleared, DF kept", "qword ptr [exc_rflags]", 0x402
    // from compatibility mode
    ARM 1f
    push UDS
    push offset user_stack_top
    push 2
    push UCS32
    push offset u32_sysenter
    iretq
1:  CHECK_EXC "sysenter from compatibility mode", NONE, 0, se_next
    // SYSEXIT to 32 bits.
    ARM 1f
    mov edx, offset u32_done
    mov ecx, offset user_stack_top
    .byte 0x0f, 0x35
1:  CHECK_EXC "sysexit to 32-bit code", NONE, 0, u32_next
    CHECK "sysexit: cs", "qword ptr [exc_cs]", UCS32
    CHECK "sysexit: ss", "qword ptr [exc_ss]", UDS
    CHECK "sysexit: rsp", "qword ptr [exc_rsp]", "offset user_stack_top"
    // SYSEXIT to 64 bits.
    ARM 1f
    mov rdx, offset user_done
    mov rcx, offset user_stack_top
    .byte 0x48, 0x0f, 0x35
1:  CHECK_EXC "sysexitq", NONE, 0
    CHECK "sysexitq: cs", "qword ptr [exc_cs]", UCS64
    CHECK "sysexitq: ss", "qword ptr [exc_ss]", 0x33
    mov rdx, 0x0000800000000000
    mov rcx, offset user_stack_top
    FAULT "sysexitq to a non-canonical rip", GP, 0, .byte 0x48, 0x0f, 0x35
    mov rdx, offset user_done
    mov rcx, 0x0000800000000000
    FAULT "sysexitq with a non-canonical rsp", GP, 0, .byte 0x48, 0x0f, 0x35
    mov qword ptr [user_flags], 2
    // SYSCALL in compatibility mode is #UD on Intel and goes to CSTAR on AMD: by vendor.
    xor eax, eax
    cpuid
    cmp ebx, 0x756e6547                 // "Genu"
    jne 2f
    ARM 1f
    push UDS
    push offset user_stack_top
    push 2
    push UCS32
    push offset u32_syscall
    iretq
1:  CHECK_EXC "syscall in compatibility mode", UD, 0, u32_syscall
    jmp 1f
2:  SKIP "syscall in compatibility mode", "not an Intel processor"
1:
    // SWAPGS and the bases.
    WRMSR64 MSR_GS_BASE, 0x1111
    WRMSR64 MSR_KERNEL_GS_BASE, 0x2222
    swapgs
    RDMSR64 MSR_GS_BASE
    CHECK "swapgs: gs base", rax, 0x2222
    RDMSR64 MSR_KERNEL_GS_BASE
    CHECK "swapgs: kernel gs base", rax, 0x1111
    WRMSR64 MSR_GS_BASE, "offset data"
    mov rax, gs:[0]
    CHECK "access through gs", rax, 0x5a
    WRMSR64 MSR_FS_BASE, "offset data"
    mov rax, fs:[8]
    CHECK "access through fs", rax, 0x5b
    // A null selector loaded into FS keeps the base or zeroes it by vendor; a real one loads 32 bits.
    mov ax, KDS
    mov fs, ax
    RDMSR64 MSR_FS_BASE
    CHECK "mov fs loads the base of the descriptor", rax, 0
    // FSGSBASE.
    FAULT "rdfsbase with CR4.FSGSBASE clear", UD, 0, rdfsbase rax
    FAULT "wrgsbase with CR4.FSGSBASE clear", UD, 0, wrgsbase rax
    mov eax, 7
    xor ecx, ecx
    cpuid
    bt ebx, 0
    jnc 1f
    mov rax, cr4
    bts rax, 16
    mov cr4, rax
    mov rax, 0x123456789abc
    wrfsbase rax
    rdfsbase rdx
    CHECK "wrfsbase, rdfsbase", rdx, rax
    mov rdx, -1
    rdfsbase edx
    mov eax, 0x56789abc
    CHECK "rdfsbase r32 zero-extends", rdx, rax
    mov rax, -1
    wrgsbase eax
    RDMSR64 MSR_GS_BASE
    mov edx, -1
    CHECK "wrgsbase r32 zero-extends", rax, rdx
    mov rax, 0x0000800000000000
    FAULT "wrfsbase non-canonical", GP, 0, wrfsbase rax
    USER_SECTION
u_fsgs: mov eax, 77
    wrgsbase rax
    rdgsbase rdx
    int 0x80
    END_SECTION
    USER "cpl 3: wrgsbase", u_fsgs, NONE
    CHECK "cpl 3: rdgsbase", rdx, 77
    mov rax, cr4
    btr rax, 16
    mov cr4, rax
    jmp 2f
1:  SKIP "wrfsbase, rdfsbase", "no FSGSBASE"
    SKIP "rdfsbase r32 zero-extends", "no FSGSBASE"
    SKIP "wrgsbase r32 zero-extends", "no FSGSBASE"
    SKIP "wrfsbase non-canonical", "no FSGSBASE"
    SKIP "cpl 3: wrgsbase", "no FSGSBASE"
    SKIP "cpl 3: rdgsbase", "no FSGSBASE"
2:
    // CR4.TSD: RDTSC and RDTSCP at CPL 3 only; CPUID always.
    USER_SECTION
u_rdtsc: rdtsc
    int 0x80
u_rdtscp: rdtscp
    int 0x80
u_cpuid: xor eax, eax
    cpuid
    int 0x80
u_rdpmc: xor ecx, ecx
u_rdpmc1: rdpmc
u_sgdt: sgdt [rsp - 32]
    int 0x80
u_sidt: sidt [rsp - 32]
    int 0x80
u_sldt: sldt eax
    int 0x80
u_str: str eax
    int 0x80
u_smsw: smsw eax
    int 0x80
    END_SECTION
    USER "cpl 3: rdtsc", u_rdtsc, NONE
    USER "cpl 3: cpuid", u_cpuid, NONE
    mov rax, cr4
    bts rax, 2
    mov cr4, rax
    USER "cpl 3: rdtsc with TSD", u_rdtsc, GP, 0, u_rdtsc
    mov eax, 0x80000001
    cpuid
    bt edx, 27
    jnc 1f
    USER "cpl 3: rdtscp with TSD", u_rdtscp, GP, 0, u_rdtscp
    jmp 2f
1:  SKIP "cpl 3: rdtscp with TSD", "no RDTSCP"
2:  FINE "cpl 0: rdtsc with TSD", rdtsc
    USER "cpl 3: cpuid with TSD", u_cpuid, NONE
    mov rax, cr4
    btr rax, 2
    mov cr4, rax
    USER "cpl 3: rdpmc with PCE clear", u_rdpmc, GP, 0, u_rdpmc1
    mov ecx, 0x12345
    FAULT "cpl 0: rdpmc of a counter that does not exist", GP, 0, rdpmc
    // UMIP.
    USER "cpl 3: sgdt without UMIP", u_sgdt, NONE
    USER "cpl 3: smsw without UMIP", u_smsw, NONE
    USER "cpl 3: str without UMIP", u_str, NONE
    CHECK "cpl 3: str without UMIP: value", rax, TSS_SEL
    mov eax, 7
    xor ecx, ecx
    cpuid
    bt ecx, 2
    jnc 1f
    mov rax, cr4
    bts rax, 11
    mov cr4, rax
    USER "cpl 3: sgdt with UMIP", u_sgdt, GP, 0, u_sgdt
    USER "cpl 3: sidt with UMIP", u_sidt, GP, 0, u_sidt
    USER "cpl 3: sldt with UMIP", u_sldt, GP, 0, u_sldt
    USER "cpl 3: str with UMIP", u_str, GP, 0, u_str
    USER "cpl 3: smsw with UMIP", u_smsw, GP, 0, u_smsw
    FINE "cpl 0: smsw with UMIP", smsw eax
    jmp 2f
1:  SKIP "cpl 3: sgdt with UMIP", "no UMIP"
    SKIP "cpl 3: sidt with UMIP", "no UMIP"
    SKIP "cpl 3: sldt with UMIP", "no UMIP"
    SKIP "cpl 3: str with UMIP", "no UMIP"
    SKIP "cpl 3: smsw with UMIP", "no UMIP"
    SKIP "cpl 0: smsw with UMIP", "no UMIP"
2:  // TSC_AUX by RDTSCP and RDPID.
    mov eax, 0x80000001
    cpuid
    bt edx, 27
    jnc 1f
    WRMSR64 MSR_TSC_AUX, 0x1234
    rdtscp
    CHECK "rdtscp: ecx is TSC_AUX", rcx, 0x1234
    ret
1:  SKIP "rdtscp: ecx is TSC_AUX", "no RDTSCP"
    ret

entry:
    mov [seen_rcx], rcx
    mov [seen_r11], r11
    mov [seen_rsp], rsp
    mov rax, rsp
    mov rsp, offset rsp0_top
    pushfq
    pop [seen_flags]
    mov rsp, rax
    mov eax, cs
    mov [seen_cs], rax
    mov eax, ss
    mov [seen_ss], rax
    cmp rcx, offset u_next
    jne 1f
    sysretq
1:  jmp rcx
g_entry:
    mov rax, offset g_count
    jmp 1f
g_entry_2:
    mov rax, offset g_count_2
1:  mov [g_rsp], rsp
    mov rsp, offset rsp0_top
    pushfq
    pop rdx
    inc qword ptr [rax]
    cmp rdx, 2
    je 1f
    inc qword ptr [g_bad]
1:  cmp r11, rdi
    je 1f
    inc qword ptr [g_bad]
1:  mov eax, cs
    mov edx, ss
    cmp eax, KCS
    jne 1f
    cmp edx, KDS
    je 2f
1:  inc qword ptr [g_bad]
2:  call 5f
    std
    mov rsp, [g_rsp]
    sysretq
5:  call 6f
    ret
6:  call 7f
    ret
7:  ret
se_entry:
    int 0x80
se_next:
    nop

    USER_SECTION
u_call: syscall
u_next: int 0x80
u_gates:
    mov ebx, 300
1:  call 2f
    dec ebx
    jnz 1b
    int 0x80
2:  call 3f
    ret
3:  cld
    test ebx, 1
    jz 4f
    std
4:  lea eax, [rbx - 150]
    cmp eax, 20                         // flags of many kinds
    pushfq
    pop rdi
    syscall
u_gates_next:
    pushfq
    pop rax
    cld
    cmp rax, rdi
    jne 5f
    cmp rcx, offset u_gates_next
    jne 5f
    mov eax, cs
    cmp eax, UCS64
    jne 5f
    mov eax, ss
    cmp eax, UDS
    jne 5f
    ret
5:  ud2
u_sysenter: sysenter
    ud2
    .code32
u32_done:
    int 0x80
u32_next:
    nop
u32_sysenter: sysenter
    ud2
u32_syscall: .byte 0x0f, 0x05
    ud2
    .code64
    END_SECTION
    .data
    .align 8
data: .quad 0x5a, 0x5b
    .bss
    .align 8
g_rsp: .skip 8
g_count: .skip 8
g_count_2: .skip 8
g_bad: .skip 8
seen_rcx: .skip 8
seen_r11: .skip 8
seen_rsp: .skip 8
seen_flags: .skip 8
seen_cs: .skip 8
seen_ss: .skip 8
