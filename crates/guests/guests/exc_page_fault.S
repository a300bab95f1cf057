// #PF: every bit of the error code, CR2, and the level at which the walk stops.
// Intel SDM vol. 3, 4.7 (page-fault exceptions), 4.6 (access rights), 4.1.4 (reserved bits).
#include "berth.inc"
#define P 1
#define W 2
#define U 4
#define RSVD 8
#define I 16
    .text
    .globl main
main:
    // A tree of its own at PML4[1]: one table per level, entries set as the test needs.
    lea rax, [t_pdpt + 7]
    mov [pml4 + 8], rax
    lea rax, [t_pd + 7]
    mov [t_pdpt], rax
    lea rax, [t_pt + 7]
    mov [t_pd], rax
    lea rax, [frame + 3]
    mov [t_pt + 8], rax                 // page 1: supervisor, writable
    lea rax, [frame + 1]
    mov [t_pt + 16], rax                // page 2: supervisor, read only
    lea rax, [frame + 7]
    mov [t_pt + 24], rax                // page 3: user, writable
    lea rax, [frame + 5]
    mov [t_pt + 32], rax                // page 4: user, read only
    lea rax, [frame + 3]
    bts rax, 63
    mov [t_pt + 40], rax                // page 5: no execute
    lea rax, [frame + 3]
    bts rax, 51
    mov [t_pt + 48], rax                // page 6: reserved address bit (MAXPHYADDR < 52 only)
    lea rax, [frame + 7]
    bts rax, 63
    mov [t_pt + 56], rax                // page 7: user, no execute
    mov byte ptr [frame], 0xc3
    mov rbx, 1 << 39

    // Not present, at the four levels.
    lea rsi, [rbx + 0x123]
    FAULT_PF "pt: not present, read", 0, rsi, mov al, [rsi]
    FAULT_PF "pt: not present, write", W, rsi, mov [rsi], al
    lea rsi, [rbx + 0x200000 + 8]
    FAULT_PF "pd: not present, read", 0, rsi, mov al, [rsi]
    FAULT_PF "pd: not present, rmw is a write", W, rsi, add [rsi], al
    mov rsi, 1 << 39 | 1 << 30
    FAULT_PF "pdpt: not present, write", W, rsi, mov [rsi], rax
    mov rsi, 2 << 39
    FAULT_PF "pml4: not present, read", 0, rsi, mov rax, [rsi]
    mov rsi, 0xffff800000001234
    FAULT_PF "pml4: not present, upper half", 0, rsi, mov rax, [rsi]
    // Fetch: I is set because NXE is on (4.7); RIP and CR2 are the target.
    ARM 1f
    jmp rsi
1:  CHECK "fetch not present: vector", "qword ptr [exc_vec]", PF
    CHECK "fetch not present: error code", "qword ptr [exc_err]", I
    CHECK "fetch not present: rip", "qword ptr [exc_rip]", rsi
    CHECK "fetch not present: cr2", "qword ptr [exc_cr2]", rsi

    // Instructions that read and write: which of the two is reported.
    lea rsi, [rbx + 0x10]
    lea rdi, [rbx + 0x20]
    FAULT_PF "xchg is a write", W, rsi, xchg [rsi], rax
    FAULT_PF "cmpxchg is a write", W, rsi, cmpxchg [rsi], rax
    FAULT_PF "lock inc is a write", W, rsi, lock inc dword ptr [rsi]
    FAULT_PF "push m: read of the source", 0, rsi, push [rsi]
    FAULT_PF "pop m: write of the target", W, rsi, pop [rsi]
    FAULT_PF "bts m is a write", W, rsi, bts dword ptr [rsi], 1
    FAULT_PF "bt m is a read", 0, rsi, bt dword ptr [rsi], 1
    FAULT_PF "test m is a read", 0, rsi, test [rsi], al
    FAULT_PF "movsb: source first", 0, rsi, movsb
    FAULT_PF "stosb", W, rdi, stosb
    FAULT_PF "scasb", 0, rdi, scasb
    FAULT_PF "movups store", W, rdi, movups [rdi], xmm0
    FAULT_PF "fxsave", W, rdi, fxsave [rdi - 0x10 + 0x10 - 0x20 + 0x20]
    FAULT_PF "fld m80", 0, rdi, fld tbyte ptr [rdi]
    FAULT_PF "call m", 0, rdi, call [rdi]
    // LOCK CMPXCHG that does not match still writes (vol. 2, CMPXCHG).
    lea rsi, [rbx + 0x2000 + 0x40]
    mov rax, 0x5555
    FAULT_PF "cmpxchg without match on a read-only page", P | W, rsi, cmpxchg [rsi], rcx
    FAULT_PF "shift by 0 still writes", P | W, rsi, .byte 0xc0, 0x26, 0x00

    // Rights, supervisor.
    lea rsi, [rbx + 0x1000]
    FINE "supervisor page: read", mov al, [rsi]
    FINE "supervisor page: write back", mov [rsi], al
    lea rsi, [rbx + 0x2000]
    FINE "read-only page: read", mov al, [rsi]
    FAULT_PF "read-only page: write with WP", P | W, rsi, mov [rsi], al
    mov rax, cr0
    btr rax, 16
    mov cr0, rax
    FINE "read-only page: write without WP", mov byte ptr [rsi], 0xc3
    bts rax, 16
    mov cr0, rax
    lea rsi, [rbx + 0x5000]
    FINE "no-execute page: read", mov al, [rsi]
    ARM 1f
    call rsi
1:  CHECK "no-execute page: fetch", "qword ptr [exc_vec]", PF
    CHECK "no-execute page: error code", "qword ptr [exc_err]", P | I
    CHECK "no-execute page: cr2", "qword ptr [exc_cr2]", rsi
    mov rsp, [fixup_rsp]
    lea rdx, [rbx + 0x1000]
    FINE "executable page: call and return", call rdx

    // Reserved bits. Bit 51 is reserved when MAXPHYADDR is below 52.
    mov eax, 0x80000008
    cpuid
    movzx eax, al
    mov rbx, 1 << 39
    lea rsi, [rbx + 0x6000]
    cmp eax, 52
    jae 1f
    FAULT_PF "reserved bit 51 in a PTE", P | RSVD, rsi, mov al, [rsi]
    FAULT_PF "reserved bit 51, write", P | W | RSVD, rsi, mov [rsi], al
    jmp 2f
1:  SKIP "reserved bit 51 in a PTE", "MAXPHYADDR is 52"
    SKIP "reserved bit 51 in a PTE (cr2)", "MAXPHYADDR is 52"
    SKIP "reserved bit 51, write", "MAXPHYADDR is 52"
    SKIP "reserved bit 51, write (cr2)", "MAXPHYADDR is 52"
2:  // Bits 20:13 of a 2 MiB entry are reserved (4.5, table 4-18).
    mov qword ptr [t_pd + 8], 0x2083
    lea rsi, [rbx + 0x200000]
    FAULT_PF "reserved bit 13 in a 2 MiB entry", P | RSVD, rsi, mov al, [rsi]
    // PS in a PML4 entry is reserved.
    lea rax, [t_pdpt + 7 + 0x80]
    mov [pml4 + 8 * 3], rax
    mov rsi, 3 << 39
    FAULT_PF "PS in a PML4 entry", P | RSVD, rsi, mov al, [rsi]
    // A reserved bit is reported before lacking rights; a not-present entry's bits are ignored.
    mov rax, 0x2081
    mov [t_pd + 8], rax
    invlpg [rbx + 0x200000]
    lea rsi, [rbx + 0x200000]
    FAULT_PF "reserved bit and no write right", P | W | RSVD, rsi, mov [rsi], al
    mov rax, 0x7fffffffffffe082
    mov [t_pd + 8], rax
    FAULT_PF "not present with every other bit set", 0, rsi, mov al, [rsi]
    // NX bit with EFER.NXE clear is reserved; I is not reported then (4.7).
    RDMSR64 MSR_EFER
    btr eax, 11
    wrmsr
    lea rsi, [rbx + 0x5000]
    invlpg [rsi]
    FAULT_PF "XD set with NXE clear", P | RSVD, rsi, mov al, [rsi]
    lea rsi, [rbx + 0x9000]
    ARM 1f
    jmp rsi
1:  CHECK "fetch not present with NXE clear and no SMEP: I clear", "qword ptr [exc_err]", 0
    RDMSR64 MSR_EFER
    bts eax, 11
    wrmsr

    // CPL 3.
    .macro USERPF name, off, err, insn:vararg
    USER_SECTION
.Lu\@: \insn
    int 0x80
    END_SECTION
    mov rsi, 1 << 39 | \off
    USER "cpl 3: \name", .Lu\@, PF, \err, .Lu\@
    mov rsi, 1 << 39 | \off
    CHECK "cpl 3: \name (cr2)", "qword ptr [exc_cr2]", rsi
    .endm
    .macro USERFINE name, off, insn:vararg
    USER_SECTION
.Lu\@: \insn
    int 0x80
    END_SECTION
    mov rsi, 1 << 39 | \off
    USER "cpl 3: \name", .Lu\@, NONE
    .endm
    USERPF "not present, read", 0x0, U, mov al, [rsi]
    USERPF "not present, write", 0x0, U|W, mov [rsi], al
    USERPF "supervisor page, read", 0x1000, P|U, mov al, [rsi]
    USERPF "supervisor page, write", 0x1000, P|U|W, mov [rsi], al
    USERPF "read-only page, write", 0x4000, P|U|W, mov [rsi], al
    USERFINE "read-only page, read", 0x4000, mov al, [rsi]
    USERFINE "user page, write back", 0x3008, mov [rsi], al
    USERFINE "prefetch never faults", 0x1000, .byte 0x0f, 0x0d, 0x0e
    USER_SECTION
ufetch: jmp rsi
    END_SECTION
    mov rsi, 1 << 39 | 0x1000
    USER "cpl 3: supervisor page, fetch", ufetch, PF, P|U|I
    CHECK "cpl 3: supervisor page, fetch: rip", "qword ptr [exc_rip]", rsi
    mov rsi, 1 << 39 | 0x7000
    USER "cpl 3: no-execute page, fetch", ufetch, PF, P|U|I
    mov rsi, 1 << 39 | 0x0
    USER "cpl 3: not present, fetch", ufetch, PF, U|I
    // U clear in an upper level makes everything below supervisor (4.6.1).
    and byte ptr [t_pd], ~4
    mov rax, cr3
    mov cr3, rax
    USERPF "U clear in the PDE", 0x3000, P|U, mov al, [rsi]
    or byte ptr [t_pd], 4
    // W clear in an upper level.
    and byte ptr [t_pdpt], ~2
    mov rax, cr3
    mov cr3, rax
    USERPF "W clear in the PDPTE", 0x3000, P|U|W, mov [rsi], al
    or byte ptr [t_pdpt], 2
    // XD in an upper level.
    bts qword ptr [pml4 + 8], 63
    mov rax, cr3
    mov cr3, rax
    mov rsi, 1 << 39 | 0x3000
    USER "cpl 3: XD in the PML4E, fetch", ufetch, PF, P|U|I
    btr qword ptr [pml4 + 8], 63
    mov rax, cr3
    mov cr3, rax
    // Implicit supervisor accesses at CPL 3 (loading a segment from the GDT) are supervisor ones.
    USERFINE "segment load reads the supervisor GDT", 0x3000, mov ds, [user_ds]
    USER_SECTION
user_ds: .word UDS
    END_SECTION
    ret

    .data
    .bss
    .align 4096
t_pdpt: .skip 4096
t_pd: .skip 4096
t_pt: .skip 4096
frame: .skip 4096
