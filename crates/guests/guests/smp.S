// Several processors: INIT-SIPI-SIPI, locked operations with counts, IPIs, litmus tests, code changed
// by another processor. Intel SDM vol. 3, 8.4 (start-up), 8.1 (LOCK), 8.2 (ordering), 10.6 (IPIs).
#include "berth.inc"
    .text
    .globl main, ap_main
#define ROUNDS 20000
#define SPLIT_ROUNDS 500
// Each of these locks the bus, which hosts that trap that make take milliseconds.
#define BUS_ROUNDS 1000
#define BESIDE_ROUNDS 5000
#define TRAMPOLINE 0x8000
main:
    mov dword ptr [APIC + 0xf0], 0x1ff  // software enable, spurious vector 0xff
    mov dword ptr [APIC + 0x80], 0
    mov eax, [APIC + 0x20]
    shr eax, 24
    mov [bsp_id], eax
    // Copy the trampoline and start everybody else.
    mov rsi, offset tramp
    mov edi, TRAMPOLINE
    mov ecx, offset tramp_end - tramp
    rep movsb
    mov dword ptr [APIC + 0x310], 0
    mov dword ptr [APIC + 0x300], 0x000c4500   // INIT, all but self
    mov edi, 10
    call wait_ms
    mov dword ptr [APIC + 0x300], 0x000c4600 | TRAMPOLINE >> 12
    mov edi, 1
    call wait_ms
    mov dword ptr [APIC + 0x300], 0x000c4600 | TRAMPOLINE >> 12
    mov edi, 200
    call wait_ms
    mov eax, [started]
    inc eax
    mov [cpus], eax
    cmp eax, 1
    seta al
    movzx eax, al
    CHECK "another processor started", rax, 1
    cmp dword ptr [cpus], 1
    jne 1f
    ret
1:  mov eax, [real_mode_seen]
    CHECK "they start in real mode at the vector's page, cs = page << 8", rax, TRAMPOLINE>>4
    mov eax, [seen_ids]
    popcnt eax, eax
    mov ecx, [started]
    CHECK "each has an APIC id of its own", rax, rcx

    // Work 1: locked counters, all processors at once.
    .macro ALL work
    mov rax, offset \work
    call run_all
    .endm
    .macro PER_CPU name, where, per
    mov eax, [cpus]
    imul rax, rax, \per
    CHECK "\name", "\where", rax
    .endm
    ALL w_inc
    PER_CPU "lock inc", "qword ptr [c_inc]", ROUNDS
    ALL w_add
    PER_CPU "lock add m32 not aligned, within a line", "qword ptr [c_un + 1]", ROUNDS
    ALL w_line
    PER_CPU "lock add m64 across cache lines", "qword ptr [c_line + 60]", BUS_ROUNDS
    ALL w_page
    PER_CPU "lock add m64 across pages", "qword ptr [c_page + 4092]", BUS_ROUNDS
    // Two pages whose frames are not neighbours; some processors add to a number that lies across
    // them, the others to its halves, each of which lies in one page.
    lea rax, [s_pdpt + 7]
    mov [pml4 + 8], rax
    lea rax, [s_pd + 7]
    mov [s_pdpt], rax
    lea rax, [s_pt + 7]
    mov [s_pd], rax
    lea rax, [s_frames + 0x2000 + 3]
    mov [s_pt], rax
    lea rax, [s_frames + 3]
    mov [s_pt + 8], rax
    mov eax, [cpus]
    inc eax
    shr eax
    mov [s_left], eax                   // processors 0, 2, ... add across
    imul rax, rax, SPLIT_ROUNDS
    mov [s_adds], rax
    ALL w_split
    mov eax, [s_adds]
    mov ecx, [s_frames + 0x2ffc]
    CHECK "lock add m64 across frames: the half in the first page", rcx, rax
    mov ecx, [s_frames]
    CHECK "lock add m64 across frames: the half in the second page", rcx, rax
    ALL w_xadd
    PER_CPU "lock xadd", "qword ptr [c_xadd]", ROUNDS
    // every ticket was drawn once: the sum of tickets
    mov eax, [cpus]
    imul rax, rax, ROUNDS
    lea rdx, [rax - 1]
    imul rax, rdx
    shr rax, 1
    CHECK "lock xadd: sum of tickets", "qword ptr [c_sum]", rax
    ALL w_cmpxchg
    PER_CPU "lock cmpxchg loop", "qword ptr [c_cas]", ROUNDS
    ALL w_cmpxchg8
    PER_CPU "lock cmpxchg8b loop", "qword ptr [c_cas8]", ROUNDS
    ALL w_cmpxchg16
    PER_CPU "lock cmpxchg16b loop, low", "qword ptr [c_cas16]", ROUNDS
    PER_CPU "lock cmpxchg16b loop, high", "qword ptr [c_cas16 + 8]", ROUNDS
    ALL w_bts
    PER_CPU "lock bts as a spin lock", "qword ptr [c_guarded]", ROUNDS
    ALL w_xchg
    PER_CPU "xchg as a spin lock (implicit LOCK)", "qword ptr [c_guarded2]", ROUNDS
    ALL w_or
    mov eax, [cpus]
    mov ecx, eax
    mov edx, 1
    shl rdx, cl
    dec rdx
    CHECK "lock or, and, xor: own bits", "qword ptr [c_or]", rdx
    ALL w_sub
    CHECK "lock inc and dec to nothing", "qword ptr [c_sub]", 0

    // Store buffering with MFENCE: never both zero (8.2.3.4, 8.2.5).
    ALL w_sb
    CHECK "store buffering with mfence", "qword ptr [sb_bad]", 0
    // Message passing without fences (8.2.3.2, 8.2.3.3).
    ALL w_mp
    CHECK "message passing", "qword ptr [mp_bad]", 0
    // Time stamp counters: one processor never sees less than another wrote before.
    ALL w_tsc
    CHECK "tsc is monotonic between processors", "qword ptr [tsc_bad]", 0

    // Code changed by processor 0 while the others call it: either version, nothing else; and after
    // the flag (and a serialising instruction there, 8.1.3) the new one.
    ALL w_code
    CHECK "code changed elsewhere: only old or new results", "qword ptr [code_bad]", 0
    CHECK "code changed elsewhere: new after the protocol", "qword ptr [code_stale]", 0

    // Processors 0, 2, ... count in a page from which the others execute.
    mov eax, [cpus]
    inc eax
    shr eax
    mov [b_left], eax
    imul rax, rax, BESIDE_ROUNDS
    mov [b_adds], rax
    ALL w_beside
    mov rax, [b_adds]
    CHECK "counters beside code that others execute, first", "qword ptr [b_counts]", rax
    CHECK "counters beside code that others execute, second", "qword ptr [b_counts + 8]", rax

    // IPIs to the others, which wait in HLT with interrupts on.
    mov rax, offset on_ipi
    mov [hooks + 0xa0 * 8], rax
    mov rax, offset on_nmi
    mov [hooks + NMI * 8], rax
    mov rax, offset w_hlt
    call start_all
    mov edi, 20
    call wait_ms
    // They sleep now; nobody has to be woken for this.
    mov rbx, 1 << 39
    mov dword ptr [s_frames], 0
    mov dword ptr [s_frames + 0x2ffc], -1
    lock inc qword ptr [rbx + 0xffc]
    mov eax, [s_frames]
    CHECK "lock inc across frames while the others sleep", rax, 1
    mov dword ptr [APIC + 0x300], 0x000c40a0
    mov r9d, [started]
    call wait_ipis
    mov eax, [ipis]
    mov ecx, [started]
    CHECK "fixed ipi to all but self", rax, rcx
    mov dword ptr [ipis], 0
    mov ecx, [ap_ids]
    shl ecx, 24
    mov [APIC + 0x310], ecx
    mov dword ptr [APIC + 0x300], 0x000040a0
    mov r9d, 1
    call wait_ipis
    mov eax, [ipis]
    CHECK "fixed ipi to one processor", rax, 1
    mov dword ptr [ipis], 0
    sti
    mov dword ptr [APIC + 0x300], 0x000440a0
    mov r9d, 1
    call wait_ipis
    cli
    mov eax, [ipis]
    CHECK "ipi to self", rax, 1
    mov dword ptr [ipis], 0
    sti
    mov dword ptr [APIC + 0x300], 0x000840a0
    mov r9d, [cpus]
    call wait_ipis
    cli
    mov eax, [ipis]
    mov ecx, [cpus]
    CHECK "ipi to all with self", rax, rcx
    // NMI to the others. They run handlers on one IST each: one at a time.
    mov dword ptr [ipis], 0
    mov ecx, [ap_ids]
    shl ecx, 24
    mov [APIC + 0x310], ecx
    mov dword ptr [APIC + 0x300], 0x00004400
    // On a busy host the other processor may not run for long.
    mov dword ptr [patience], 200
7:  mov edi, 20
    call wait_ms
    cmp dword ptr [nmis], 0
    jne 8f
    dec dword ptr [patience]
    jnz 7b
8:  mov eax, [nmis]
    CHECK "nmi to one processor", rax, 1
    mov dword ptr [stop], 1
    mov dword ptr [APIC + 0x300], 0x000c40a0
    call join_all
    // A second INIT puts them back; SIPI starts them again.
    mov eax, [started]
    mov [started_first], eax
    mov dword ptr [APIC + 0x310], 0
    mov dword ptr [APIC + 0x300], 0x000c4500
    mov edi, 10
    call wait_ms
    mov dword ptr [started], 0
    mov dword ptr [APIC + 0x300], 0x000c4600 | TRAMPOLINE >> 12
    mov dword ptr [patience], 200
7:  mov edi, 20
    call wait_ms
    mov eax, [started]
    cmp eax, [started_first]
    jae 8f
    dec dword ptr [patience]
    jnz 7b
8:  mov eax, [started]
    mov ecx, [started_first]
    CHECK "init and sipi again restart them", rax, rcx
    ALL w_inc
    PER_CPU "lock inc after the restart", "qword ptr [c_inc]", ROUNDS*2
    ret

    // run_all: RAX work; everybody calls it with EBX = number (0: this one), then waits for all.
run_all:
    call start_all
    xor ebx, ebx
    call [work]
    // falls into join_all
join_all:
1:  mov eax, [finished]
    pause
    cmp eax, [started]
    jb 1b
    ret
start_all:
    mov dword ptr [finished], 0
    mov dword ptr [arrived], 0
    mov [work], rax
    lock inc dword ptr [generation]
    ret
    // wait_ipis: until there were R9D, which may take long on a busy host, and a bit longer, for those
    // that are too many.
wait_ipis:
    mov r8d, 400
1:  mov edi, 10
    call wait_ms
    cmp [ipis], r9d
    jae 2f
    dec r8d
    jnz 1b
2:  mov edi, 10
    call wait_ms
    ret

    // ap_main: every other processor, in 64-bit mode.
ap_main:
    lidt [idt_ptr]
    mov dword ptr [APIC + 0xf0], 0x1ff
    mov eax, 1
    lock xadd [started], eax
    inc eax
    mov ebx, eax                        // number, from 1
    mov ecx, eax
    shl rcx, 14
    lea rsp, [ap_stacks + rcx]
    // a TSS of its own
    mov eax, ebx
    shl eax, 7
    lea rax, [ap_tss + rax]
    mov [rax + 4], rsp
    lea rdx, [rsp - 8192]
    mov [rax + 44], rdx
    mov ecx, 0x89
    mov edx, 103
    lea rdi, [gdt + FREE_SEL]
    mov esi, ebx
    shl esi, 4
    add rdi, rsi
    call make_system_descriptor
    lea eax, [rsi + FREE_SEL]
    ltr ax
    mov eax, [APIC + 0x20]
    shr eax, 24
    bts [seen_ids], eax
    mov [ap_ids], eax
    mov dword ptr [APIC + 0x80], 0
    mov r15d, [generation]
1:  pause
    mov eax, [generation]
    cmp eax, r15d
    je 1b
    mov r15d, eax
    mov rax, [work]
    call rax
    lock inc dword ptr [finished]
    jmp 1b

w_inc:
    mov ecx, ROUNDS
1:  lock inc qword ptr [c_inc]
    loop 1b
    ret
w_add:
    mov ecx, ROUNDS
1:  lock add dword ptr [c_un + 1], 1
    loop 1b
    ret
w_line:
    mov ecx, BUS_ROUNDS
1:  lock add qword ptr [c_line + 60], 1
    loop 1b
    ret
w_page:
    mov ecx, BUS_ROUNDS
1:  lock add qword ptr [c_page + 4092], 1
    loop 1b
    ret
w_split:
    test ebx, 1
    jnz 3f
    mov ecx, [cpus]
    shr ecx
2:  pause
    cmp [s_counting], ecx               // all others are at it
    jb 2b
    mov ecx, SPLIT_ROUNDS
    mov rdx, 1 << 39
    mov rax, 0x0000000100000001
1:  lock add [rdx + 0xffc], rax
    loop 1b
    lock dec dword ptr [s_left]
    ret
3:  lock inc dword ptr [s_counting]
    xor eax, eax                        // the others count as long as that takes
4:  lock inc dword ptr [s_frames + 0x2ffc]
    lock inc dword ptr [s_frames]
    inc rax
    cmp dword ptr [s_left], 0
    jne 4b
    lock add [s_adds], rax
    ret
w_xadd:
    mov ecx, ROUNDS
    xor edx, edx
1:  mov eax, 1
    lock xadd [c_xadd], rax
    add rdx, rax
    loop 1b
    lock add [c_sum], rdx
    ret
w_cmpxchg:
    mov ecx, ROUNDS
1:  mov rax, [c_cas]
2:  lea rdx, [rax + 1]
    lock cmpxchg [c_cas], rdx
    jne 2b
    loop 1b
    ret
w_cmpxchg8:
    mov r14d, ebx
    mov esi, ROUNDS
1:  mov eax, [c_cas8]
    mov edx, [c_cas8 + 4]
2:  mov ebx, eax
    mov ecx, edx
    add ebx, 1
    adc ecx, 0
    lock cmpxchg8b [c_cas8]
    jne 2b
    dec esi
    jnz 1b
    mov ebx, r14d
    ret
w_cmpxchg16:
    mov r14d, ebx
    mov esi, ROUNDS
1:  mov rax, [c_cas16]
    mov rdx, [c_cas16 + 8]
2:  lea rbx, [rax + 1]
    lea rcx, [rdx + 1]
    lock cmpxchg16b [c_cas16]
    jne 2b
    dec esi
    jnz 1b
    mov ebx, r14d
    ret
w_bts:
    mov ecx, ROUNDS
1:  lock bts dword ptr [lock1], 5
    jc 3f
    inc qword ptr [c_guarded]
    lock btr dword ptr [lock1], 5
    loop 1b
    ret
3:  pause
    jmp 1b
w_xchg:
    mov ecx, ROUNDS
1:  mov eax, 1
    xchg [lock2], eax
    test eax, eax
    jnz 3f
    inc qword ptr [c_guarded2]
    mov dword ptr [lock2], 0
    loop 1b
    ret
3:  pause
    jmp 1b
w_or:
    mov ecx, ebx
    mov eax, 1
    shl rax, cl
    mov rdx, rax
    not rdx
    mov ecx, ROUNDS | 1
1:  lock or [c_or], rax
    lock and [c_or], rdx
    lock xor [c_or], rax
    loop 1b
    ret
w_sub:
    mov ecx, ROUNDS
1:  lock inc qword ptr [c_sub]
    lock dec qword ptr [c_sub]
    loop 1b
    ret

    // barrier: waits until processors 0 and 1 are here (ESI counts rounds).
barrier:
    lock inc dword ptr [arrived]
    lea eax, [rsi * 2]
2:  cmp [arrived], eax
    jae 3f
    pause
    jmp 2b
3:  ret
w_sb:
    cmp ebx, 1
    ja 9f
    xor esi, esi
1:  inc esi
    mov edi, ebx
    shl edi, 6
    mov dword ptr [sb_x + rdi], 0
    call barrier
    inc esi
    mov edx, edi
    xor edx, 64
    mov dword ptr [sb_x + rdi], 1
    mfence
    mov eax, [sb_x + rdx]
    mov [sb_r + rdi], eax
    call barrier
    inc esi
    test ebx, ebx
    jnz 2f
    mov eax, [sb_r]
    or eax, [sb_r + 64]
    jnz 2f
    inc qword ptr [sb_bad]
2:  call barrier
    cmp esi, 6000
    jb 1b
9:  ret
w_mp:
    cmp ebx, 1
    ja 9f
    je 5f
    xor ecx, ecx
1:  inc rcx
    mov [mp_data], rcx
    mov [mp_flag], rcx
    cmp ecx, 200000
    jb 1b
9:  ret
5:  mov rax, [mp_flag]
    mov rdx, [mp_data]
    cmp rdx, rax
    jae 6f
    inc qword ptr [mp_bad]
6:  cmp eax, 200000
    jb 5b
    ret
w_tsc:
    mov ecx, ROUNDS
1:  mov r8, [tsc_last]
    lfence
    rdtsc
    shl rdx, 32
    or rax, rdx
    cmp rax, r8
    jae 2f
    lock inc qword ptr [tsc_bad]
2:  cmp rax, r8
    jbe 3f
    xchg r8, rax
    lock cmpxchg [tsc_last], r8
3:  dec ecx
    jnz 1b
    ret
w_code:
    test ebx, ebx
    jnz 5f
    // the writer: 500 versions, each acknowledged by processor 1
    mov ecx, 1
1:  mov [patched + 1], ecx              // the immediate is within 8 aligned bytes
    mov [version], ecx
2:  pause
    cmp [seen_version], ecx
    jne 2b
    inc ecx
    cmp ecx, 500
    jbe 1b
    mov dword ptr [version], -1
    ret
5:  mov r8d, ebx
    xor r9d, r9d
6:  call patched
    cmp eax, 500
    jbe 7f
    lock inc qword ptr [code_bad]
7:  cmp eax, r9d
    jae 7f
    lock inc qword ptr [code_bad]       // versions go up only
7:  mov r9d, eax
    mov r10d, [version]
    cmp r10d, -1
    je 8f
    cmp r10d, r11d
    je 6b
    mov r11d, r10d
    xor eax, eax
    cpuid                               // serialise
    call patched
    cmp eax, r10d
    jae 7f
    lock inc qword ptr [code_stale]
7:  cmp r8d, 1
    jne 6b
    mov [seen_version], r10d
    jmp 6b
8:  mov ebx, r8d
    ret
    .align 4096                         // a page of its own: the writer's code is elsewhere
    nop
    nop
    nop
patched:
    mov eax, 0
    ret
    .align 4096

w_beside:
    test ebx, 1
    jnz 3f
    mov ecx, BESIDE_ROUNDS
    mov rdx, offset b_counts
1:  lock inc qword ptr [rdx]
    lock inc qword ptr [rdx + 8]
    loop 1b
    lock dec dword ptr [b_left]
    ret
3:  call beside
    cmp dword ptr [b_left], 0
    jne 3b
    ret
    .align 4096
beside:
    ret
    .align 64
b_counts: .skip 64
    .align 4096

w_hlt:
    mov dword ptr [stop], 0
1:  sti
    hlt
    cli
    cmp dword ptr [stop], 0
    je 1b
    ret
on_ipi:
    lock inc dword ptr [ipis]
    mov dword ptr [APIC + 0xb0], 0
    ret
on_nmi:
    lock inc dword ptr [nmis]
    ret

    // wait_ms: EDI milliseconds by PIT channel 2 (port 0x61 gates it).
    .globl wait_ms
wait_ms:
    in al, 0x61
    and al, 0xfc
    or al, 1
    out 0x61, al
1:  mov al, 0xb0                        // channel 2, lobyte/hibyte, mode 0
    out 0x43, al
    mov al, 1193 & 0xff
    out 0x42, al
    mov al, 1193 >> 8
    out 0x42, al
2:  in al, 0x61
    test al, 0x20
    jz 2b
    dec edi
    jnz 1b
    ret

    .code16
tramp:
    cli
    mov ax, cs
    xor bx, bx
    mov ds, bx
    mov [TRAMPOLINE + (tramp_cs - tramp)], ax
    lgdt [TRAMPOLINE + (tramp_gdt - tramp)]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea
    .long tramp32
    .word KCS32
tramp_gdt: .word GDT_END - 1
    .long gdt
tramp_cs: .word 0
tramp_end:
    .code32
tramp32:
    mov ax, KDS
    mov ds, ax
    mov es, ax
    mov ss, ax
    xor eax, eax
    mov fs, ax
    mov gs, ax
    movzx eax, word ptr [TRAMPOLINE + (tramp_cs - tramp)]
    mov [real_mode_seen], eax
    mov esp, offset ap_stacks
    jmp long_enter
    .code64

    .bss
    .align 64
c_inc: .skip 64
c_un: .skip 64
c_line: .skip 128
c_xadd: .skip 64
c_sum: .skip 64
c_cas: .skip 64
c_cas8: .skip 64
c_cas16: .skip 64
c_guarded: .skip 64
c_guarded2: .skip 64
lock1: .skip 64
lock2: .skip 64
c_or: .skip 64
c_sub: .skip 64
sb_x: .skip 128
sb_r: .skip 128
sb_bad: .skip 64
mp_data: .skip 64
mp_flag: .skip 64
mp_bad: .skip 64
tsc_last: .skip 64
tsc_bad: .skip 64
version: .skip 64
seen_version: .skip 64
code_bad: .skip 8
code_stale: .skip 8
started: .skip 4
started_first: .skip 4
cpus: .skip 4
finished: .skip 4
arrived: .skip 4
generation: .skip 4
stop: .skip 4
ipis: .skip 4
nmis: .skip 4
patience: .skip 4
seen_ids: .skip 4
ap_ids: .skip 4
bsp_id: .skip 4
real_mode_seen: .skip 8
work: .skip 8
    .align 4096
c_page: .skip 8192
s_pdpt: .skip 4096
s_pd: .skip 4096
s_pt: .skip 4096
s_frames: .skip 3 * 4096
s_adds: .skip 8
b_adds: .skip 8
b_left: .skip 8
s_left: .skip 8
s_counting: .skip 8
    .align 4096
ap_tss: .skip 17 * 128
    .align 4096
ap_stacks: .skip 17 * 16384
