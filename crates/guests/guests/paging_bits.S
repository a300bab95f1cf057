// Accessed and dirty bits at every level, NX/WP/SMEP/SMAP, large pages.
// Intel SDM vol. 3, 4.8 (A and D), 4.6 (access rights), 4.5.
#include "berth.inc"
#define A 0x20
#define D 0x40
    .text
    .globl main
    .macro FLUSH
    mov rax, cr3
    mov cr3, rax
    .endm
    // Checks the A and D bits of an entry, and clears them.
    .macro AD name, entry, want
    mov rax, [\entry]
    and eax, A | D
    CHECK "\name", rax, \want
    and qword ptr [\entry], ~(A | D)
    .endm
main:
    lea rax, [t_pdpt + 7]
    mov [pml4 + 8], rax
    lea rax, [t_pd + 7]
    mov [t_pdpt], rax
    lea rax, [t_pt + 7]
    mov [t_pd], rax
    lea rax, [frame + 7]
    mov [t_pt], rax
    lea rax, [frame2 + 3]
    mov [t_pt + 8], rax                 // page 1 supervisor
    mov qword ptr [t_pd + 8], 0x87      // 2 MiB page at physical 0, user
    mov qword ptr [t_pdpt + 8], 0x87    // 1 GiB page at physical 0, user
    mov rsi, 1 << 39
    mov rdi, 1 << 39 | 0x200000
    mov rbx, 1 << 39 | 1 << 30

    mov al, [rsi]
    AD "read: PTE accessed, not dirty", t_pt, A
    AD "read: PDE accessed", t_pd, A
    AD "read: PDPTE accessed", t_pdpt, A
    AD "read: PML4E accessed", "pml4 + 8", A
    AD "another PTE untouched", "t_pt + 8", 0
    FLUSH
    mov [rsi], al
    AD "write: PTE accessed and dirty", t_pt, A|D
    AD "write: PDE accessed only", t_pd, A
    AD "write: PML4E accessed only", "pml4 + 8", A
    FLUSH
    mov al, [rdi]
    AD "2 MiB read: accessed", "t_pd + 8", A
    FLUSH
    mov al, [rdi]
    mov [rdi], al
    AD "2 MiB write after a read: dirty", "t_pd + 8", A|D
    mov al, [rbx]
    AD "1 GiB read: accessed", "t_pdpt + 8", A
    FLUSH
    lock add byte ptr [rbx + 0x123456], 0
    AD "1 GiB locked write: dirty", "t_pdpt + 8", A|D
    // The first write through a translation cached by a read sets D (4.8).
    FLUSH
    mov al, [rsi]
    AD "read again", t_pt, A
    invlpg [rsi]
    mov al, [rsi]
    mov [rsi + 8], al
    AD "write through a translation cached by a read", t_pt, A|D
    // Fetch sets A.
    FLUSH
    mov byte ptr [frame], 0xc3
    call rsi
    AD "fetch: accessed", t_pt, A
    // A faulting access does not set D; nor does a compare that only reads.
    FLUSH
    and qword ptr [t_pt], ~2
    FAULT "write to a read-only page", PF, 3, mov [rsi], al
    mov rax, [t_pt]
    and eax, D
    CHECK "faulting write: not dirty", rax, 0
    or qword ptr [t_pt], 2
    and qword ptr [t_pt], ~(A | D)
    FLUSH
    cmp [rsi], al
    bt dword ptr [rsi], 1
    AD "cmp and bt: not dirty", t_pt, A
    // Locked compare-exchange without a match writes the old value back (vol. 2, CMPXCHG).
    FLUSH
    mov byte ptr [frame], 0xc3
    mov eax, 0x11
    lock cmpxchg [rsi], cl
    AD "lock cmpxchg without match: dirty", t_pt, A|D
    // Segment descriptors' accessed bit is written by loads of a segment register.
    mov rax, 0x00cf92000000ffff
    mov [gdt + FREE_SEL], rax
    mov ax, FREE_SEL
    mov es, ax
    mov rax, [gdt + FREE_SEL]
    shr rax, 40
    and eax, 1
    CHECK "descriptor accessed bit", rax, 1

    // WP: supervisor writes to read-only user page.
    and qword ptr [t_pt], ~2
    FLUSH
    FAULT "WP=1: supervisor write to a read-only user page", PF, 3, mov [rsi], al
    mov rax, cr0
    btr rax, 16
    mov cr0, rax
    FINE "WP=0: supervisor write to a read-only user page", mov [rsi], al
    AD "WP=0: dirty", t_pt, A|D
    mov rax, cr0
    bts rax, 16
    mov cr0, rax
    FAULT "WP=1 again after a write with WP=0", PF, 3, mov [rsi], al
    or qword ptr [t_pt], 2
    FLUSH

    // SMEP and SMAP.
    mov eax, 7
    xor ecx, ecx
    cpuid
    mov [features7], rbx
    mov rsi, 1 << 39
    mov rdi, 1 << 39 | 0x200000
    mov rbx, 1 << 39 | 1 << 30
    mov byte ptr [frame], 0xc3
    FINE "SMEP=0: supervisor fetch from a user page", call rsi
    bt dword ptr [features7], 7
    jnc no_smep
    mov rax, cr4
    bts rax, 20
    mov cr4, rax
    ARM 1f
    call rsi
1:  CHECK "SMEP: supervisor fetch from a user page", "qword ptr [exc_vec]", PF
    CHECK "SMEP: error code", "qword ptr [exc_err]", 0x11
    CHECK "SMEP: cr2", "qword ptr [exc_cr2]", rsi
    mov rsp, [fixup_rsp]
    FINE "SMEP: data access to a user page", mov al, [rsi]
    and byte ptr [t_pt], ~4
    FLUSH
    mov qword ptr [fixup], 0
    FINE "SMEP: page supervisor by its PTE", call rsi
    or byte ptr [t_pt], 4
    and byte ptr [t_pd], ~4
    FLUSH
    FINE "SMEP: page supervisor by its PDE", call rsi
    or byte ptr [t_pd], 4
    mov rax, cr4
    btr rax, 20
    mov cr4, rax
    FINE "SMEP off again", call rsi
    jmp 1f
no_smep:
    .irp n, "supervisor fetch from a user page", "error code", "cr2", "data access to a user page", "page supervisor by its PTE", "page supervisor by its PDE"
    SKIP "SMEP: \n", "no SMEP"
    .endr
    SKIP "SMEP off again", "no SMEP"
1:  bt dword ptr [features7], 20
    jnc no_smap
    FAULT "clac is refused at CPL 3 only; here it is fine, then ud2", UD, 0, ud2
    mov rax, cr4
    bts rax, 21
    mov cr4, rax
    clac
    FAULT_PF "SMAP: read of a user page", 1, rsi, mov al, [rsi]
    FAULT_PF "SMAP: write of a user page", 3, rsi, mov [rsi], al
    FAULT_PF "SMAP: push to a user page", 3, rsi, .byte 0x8f, 0x06
    lea rdx, [rsi + 0x1000]
    FINE "SMAP: supervisor page", mov al, [rdx]
    stac
    FINE "SMAP: read with AC set", mov al, [rsi]
    stac
    FINE "SMAP: write with AC set", mov [rsi], al
    clac
    FAULT_PF "SMAP: after clac, translation cached", 1, rsi, mov al, [rsi]
    pushfq
    or qword ptr [rsp], FL_AC
    popfq
    FINE "SMAP: AC set by popf", mov al, [rsi]
    clac
    FINE "SMAP: fetch from a user page is SMEP's matter", call rsi
    FAULT_PF "SMAP: 2 MiB user page", 1, rdi, mov al, [rdi]
    FAULT_PF "SMAP: 1 GiB user page", 3, rbx, mov [rbx], al
    // An LDT in the user page: implicit accesses fault even with AC set (4.6).
    stac
    mov rax, 0x00cf93000000ffff
    mov [rsi + 8], rax
    push rdi
    mov rdi, offset gdt + LDT_SEL
    mov rax, rsi
    mov ecx, 0x82
    mov edx, 15
    call make_system_descriptor
    pop rdi
    mov ax, LDT_SEL
    lldt ax
    mov ax, 0x0c
    ARM 1f
    stac
    mov es, ax
1:  CHECK "SMAP: implicit access with AC set: vector", "qword ptr [exc_vec]", PF
    CHECK "SMAP: implicit access with AC set: error code", "qword ptr [exc_err]", 1
    xor eax, eax
    lldt ax
    mov rax, cr4
    btr rax, 21
    mov cr4, rax
    clac
    FINE "SMAP off again", mov al, [rsi]
    // User mode is not affected.
    mov rax, cr4
    bts rax, 21
    mov cr4, rax
    USER_SECTION
u_read: mov al, [rsi]
    mov [rsi], al
    int 0x80
u_stac: stac
    END_SECTION
    USER "SMAP: CPL 3 reads and writes", u_read, NONE
    USER "stac at CPL 3", u_stac, UD, 0, u_stac
    jmp 1f
no_smap:
    FAULT "stac without SMAP", UD, 0, stac
1:  mov rax, cr4
    btr rax, 21
    mov cr4, rax
    ret
    .bss
    .align 4096
t_pdpt: .skip 4096
t_pd: .skip 4096
t_pt: .skip 4096
frame: .skip 4096
frame2: .skip 4096
features7: .skip 8
