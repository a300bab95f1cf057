// What invalidates translations: INVLPG, MOV CR3, global pages, PCID, INVPCID. Only what the manual
// guarantees is checked: that an invalidation works, and that results with valid cached
// translations are right. Intel SDM vol. 3, 4.10.
#include "berth.inc"
    .text
    .globl main
    // Points page \n at frame \f (0 or 1), which hold the bytes 'A' and 'B'.
    .macro MAP n, f, bits
    lea rax, [frames + \f * 4096 + \bits]
    mov [t_pt + \n * 8], rax
    .endm
    .macro SEE name, addr, want
    movzx eax, byte ptr [\addr]
    CHECK "\name", rax, \want
    .endm
main:
    mov byte ptr [frames], 'A'
    mov byte ptr [frames + 4096], 'B'
    lea rax, [t_pdpt + 7]
    mov [pml4 + 8], rax
    lea rax, [t_pd + 7]
    mov [t_pdpt], rax
    lea rax, [t_pt + 7]
    mov [t_pd], rax
    mov rsi, 1 << 39

    // INVLPG.
    MAP 0, 0, 3
    SEE "first", rsi, 'A'
    MAP 0, 1, 3
    invlpg [rsi + 0x123]
    SEE "invlpg anywhere in the page", rsi, 'B'
    mov qword ptr [t_pt], 0
    invlpg [rsi]
    FAULT_PF "invlpg after unmapping", 0, rsi, mov al, [rsi]
    // Not-present entries are not cached: no invalidation is needed after setting P (4.10.2.3).
    MAP 0, 0, 3
    SEE "not present to present without invalidation", rsi, 'A'
    // Lacking rights: a fault invalidates the translation (4.10.4.1), so a widened right is seen.
    MAP 0, 0, 1
    invlpg [rsi]
    FAULT_PF "read-only", 3, rsi, mov byte ptr [rsi], 'A'
    MAP 0, 0, 3
    FINE "right widened after its fault", mov byte ptr [rsi], 'A'
    // INVLPG of a non-canonical address does nothing (vol. 2, INVLPG).
    mov rdx, 0x0000800000000000
    FINE "invlpg non-canonical", invlpg [rdx]

    // MOV CR3.
    MAP 0, 1, 3
    mov rax, cr3
    mov cr3, rax
    SEE "mov cr3", rsi, 'B'
    // Global pages survive MOV CR3 at the processor's choice; INVLPG and a change of PGE end them.
    MAP 1, 0, 0x103
    lea rdi, [rsi + 0x1000]
    SEE "global page", rdi, 'A'
    mov rax, cr3
    mov cr3, rax
    SEE "global page after mov cr3", rdi, 'A'
    MAP 1, 1, 0x103
    invlpg [rdi]
    SEE "global page after invlpg", rdi, 'B'
    MAP 1, 0, 0x103
    mov rax, cr4
    btc rax, 7
    mov cr4, rax
    SEE "global page after clearing PGE", rdi, 'A'
    MAP 1, 1, 0x103
    mov rax, cr4
    btc rax, 7
    mov cr4, rax
    SEE "global page after setting PGE", rdi, 'B'

    // Code in a global page that was jumped to from several address spaces.
    mov dword ptr [frames + 16], 0xc341b0           // mov al, 'A'; ret
    mov dword ptr [frames + 4096 + 16], 0xc342b0
    lea rax, [t_pdpt + 7]
    mov [pml4 + 300 * 8], rax
    MAP 3, 0, 0x103
    mov rdi, 0xffff960000003010
    .irp n, first, again
    xor eax, eax
    call rdi
    CHECK "global code, \n", rax, 'A'
    mov rax, cr3
    mov cr3, rax
    .endr
    MAP 3, 1, 0x103
    invlpg [rdi + 0x10]
    xor eax, eax
    call rdi
    CHECK "global code after invlpg", rax, 'B'

    // A change of an upper entry needs an invalidation too; INVLPG drops paging-structure caches.
    lea rax, [t_pt2 + 7]
    mov [t_pd], rax
    lea rax, [frames + 3]
    mov [t_pt2], rax
    invlpg [rsi]
    SEE "another page table after invlpg", rsi, 'A'
    lea rax, [t_pt + 7]
    mov [t_pd], rax
    mov rax, cr3
    mov cr3, rax
    SEE "another page table after mov cr3", rsi, 'B'
    // 2 MiB page replaced by a table: INVLPG of any address in it is enough.
    mov qword ptr [t_pd + 8], 0x83
    lea rdi, [rsi + 0x200000]
    mov rax, [rdi + 0x100000]           // our own ELF's first page is at 1 MiB
    mov rdx, [0x100000]
    CHECK "2 MiB page", rax, rdx
    lea rax, [t_pt2 + 7]
    mov [t_pd + 8], rax
    mov rax, cr3
    mov cr3, rax
    SEE "2 MiB page replaced by a table", rdi, 'A'

    // Changes that must drop everything: CR0.WP needs none of them but takes effect at once.
    MAP 0, 0, 1
    invlpg [rsi]
    SEE "read-only page", rsi, 'A'
    mov rax, cr0
    btr rax, 16
    mov cr0, rax
    FINE "WP cleared takes effect", mov byte ptr [rsi], 'A'
    bts rax, 16
    mov cr0, rax
    FAULT "WP set takes effect", PF, 3, mov byte ptr [rsi], 'A'
    // EFER.NXE takes effect for a page with XD that was already used for data.
    MAP 2, 0, 3
    bts qword ptr [t_pt + 16], 63
    lea rdi, [rsi + 0x2000]
    SEE "XD page, data", rdi, 'A'
    ARM 1f
    jmp rdi
1:  CHECK "XD page, fetch after data access", "qword ptr [exc_err]", 0x11

    // Another address space by CR3: same addresses, other contents.
    mov rcx, 512
    push rsi
    mov rsi, offset pml4
    mov rdi, offset t_pml4b
    rep movsq
    pop rsi
    lea rax, [t_pdptb + 7]
    mov [t_pml4b + 8], rax
    lea rax, [t_pdb + 7]
    mov [t_pdptb], rax
    lea rax, [t_pt2 + 7]
    mov [t_pdb], rax
    lea rax, [frames + 3]
    mov [t_pt2], rax
    MAP 0, 1, 3
    invlpg [rsi]
    SEE "space a", rsi, 'B'
    mov rax, offset t_pml4b
    mov cr3, rax
    SEE "space b", rsi, 'A'
    mov rax, offset pml4
    mov cr3, rax
    SEE "space a again", rsi, 'B'

    // PCID (4.10.1): two spaces with tags, bit 63 keeps translations; results must be right.
    mov eax, 1
    cpuid
    bt ecx, 17
    jnc no_pcid
    mov rax, cr4
    bts rax, 17
    mov cr4, rax
    mov rax, offset t_pml4b + 5
    mov cr3, rax
    SEE "pcid 5", rsi, 'A'
    mov rax, cr3
    mov rdx, offset t_pml4b + 5
    CHECK "cr3 reads back its pcid", rax, rdx
    mov rax, offset pml4 + 6
    mov cr3, rax
    SEE "pcid 6", rsi, 'B'
    mov rax, offset t_pml4b + 5
    bts rax, 63
    mov cr3, rax
    SEE "pcid 5, not flushed", rsi, 'A'
    mov rax, cr3
    mov rdx, offset t_pml4b + 5
    CHECK "cr3 bit 63 reads 0", rax, rdx
    mov rax, offset pml4 + 6
    bts rax, 63
    mov cr3, rax
    SEE "pcid 6, not flushed", rsi, 'B'
    // A change of space b, then a flushing load of its tag.
    lea rax, [frames + 4096 + 3]
    mov [t_pt2], rax
    mov rax, offset t_pml4b + 5
    mov cr3, rax
    SEE "pcid 5 flushed by mov cr3", rsi, 'B'
    // INVLPG is for the current tag.
    lea rax, [frames + 3]
    mov [t_pt2], rax
    invlpg [rsi]
    SEE "pcid 5, invlpg", rsi, 'A'
    mov eax, 7
    xor ecx, ecx
    push rbx
    cpuid
    bt ebx, 10
    pop rbx
    jnc no_invpcid
    // INVPCID type 0: one address of one tag, from another tag.
    mov rax, offset pml4 + 6
    bts rax, 63
    mov cr3, rax
    lea rax, [frames + 4096 + 3]
    mov [t_pt2], rax
    mov qword ptr [desc], 5
    mov [desc + 8], rsi
    xor eax, eax
    invpcid rax, [desc]
    mov rax, offset t_pml4b + 5
    bts rax, 63
    mov cr3, rax
    SEE "invpcid 0: address in another tag", rsi, 'B'
    // Type 1: all of a tag.
    mov rax, offset pml4 + 6
    bts rax, 63
    mov cr3, rax
    lea rax, [frames + 3]
    mov [t_pt2], rax
    mov qword ptr [desc + 8], 0
    mov eax, 1
    invpcid rax, [desc]
    mov rax, offset t_pml4b + 5
    bts rax, 63
    mov cr3, rax
    SEE "invpcid 1: a tag", rsi, 'A'
    // Type 2: all tags and global pages; type 3: all tags without global ones.
    lea rax, [frames + 4096 + 3]
    mov [t_pt2], rax
    mov qword ptr [desc], 0
    mov eax, 2
    invpcid rax, [desc]
    SEE "invpcid 2: everything", rsi, 'B'
    lea rax, [frames + 3]
    mov [t_pt2], rax
    mov eax, 3
    invpcid rax, [desc]
    SEE "invpcid 3: all but global", rsi, 'A'
    mov rax, offset pml4 + 6
    mov cr3, rax
    MAP 1, 0, 0x103
    lea rdi, [rsi + 0x1000]
    mov eax, 2
    invpcid rax, [desc]
    SEE "invpcid 2: global page", rdi, 'A'
    // Bad types and descriptors: #GP(0) (vol. 2, INVPCID).
    mov eax, 4
    FAULT "invpcid type 4", GP, 0, invpcid rax, [desc]
    mov qword ptr [desc], 0x1000
    mov eax, 1
    FAULT "invpcid reserved descriptor bits", GP, 0, invpcid rax, [desc]
    mov qword ptr [desc], 5
    xor eax, eax
    mov rdx, 0x0000800000000000
    mov [desc + 8], rdx
    FAULT "invpcid 0 non-canonical address", GP, 0, invpcid rax, [desc]
    USER_SECTION
u_inv: invpcid rax, [rsp - 64]
    END_SECTION
    USER "invpcid at CPL 3", u_inv, GP, 0, u_inv
    jmp 1f
no_pcid:
    .irp n, "pcid 5", "cr3 reads back its pcid", "pcid 6", "pcid 5, not flushed", "cr3 bit 63 reads 0", "pcid 6, not flushed", "pcid 5 flushed by mov cr3", "pcid 5, invlpg"
    SKIP "\n", "no PCID"
    .endr
no_invpcid:
    .irp n, "0: address in another tag", "1: a tag", "2: everything", "3: all but global", "2: global page", "type 4", "reserved descriptor bits", "0 non-canonical address", "at CPL 3"
    SKIP "invpcid \n", "no INVPCID"
    .endr
    // With PCIDE clear bit 63 is reserved.
1:  mov rax, offset pml4
    mov cr3, rax
    mov rax, cr4
    btr rax, 17
    mov cr4, rax
    SEE "pcid off", rsi, 'B'
    ret
    .bss
    .align 4096
t_pdpt: .skip 4096
t_pd: .skip 4096
t_pt: .skip 4096
t_pt2: .skip 4096
t_pml4b: .skip 4096
t_pdptb: .skip 4096
t_pdb: .skip 4096
frames: .skip 8192
desc: .skip 16
