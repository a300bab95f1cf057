// Accesses and instructions that cross into a page that faults, and aliases of one physical page.
// Intel SDM vol. 3, 4.7 and 6.5 (faults leave the state before the instruction); vol. 1, 4.1.1.
#include "berth.inc"
    .text
    .globl main
    // Maps a page to a frame.
    .macro MAP page:req, frame:req
    lea rax, [frames + 0x1000 * \frame + 3]
    mov [t_pt + 8 * \page], rax
    invlpg [rbx + 0x1000 * \page]
    .endm
    // Accessed and dirty of a page.
    .macro USED name:req, page:req, want:req
    mov eax, [t_pt + 8 * \page]
    and eax, 0x60
    CHECK "\name", rax, \want
    .endm
main:
    lea rax, [t_pdpt + 7]
    mov [pml4 + 8], rax
    lea rax, [t_pd + 7]
    mov [t_pdpt], rax
    lea rax, [t_pt + 7]
    mov [t_pd], rax
    lea rax, [frames + 3]
    mov [t_pt], rax                     // page 0 -> frame 0
    lea rax, [frames + 0x1000 + 3]
    mov [t_pt + 16], rax                // page 2 -> frame 1
    lea rax, [frames + 0x1000 + 3]
    mov [t_pt + 24], rax                // page 3 -> frame 1 as well
    lea rax, [frames + 3]
    mov [t_pt + 32], rax                // page 4 -> frame 0: 3,4 are 0,1 the other way round
    lea rax, [frames + 1]
    mov [t_pt + 40], rax                // page 5 -> frame 0, read only
    mov rbx, 1 << 39
    lea rsi, [rbx + 0xffc]
    lea r15, [rbx + 0x1000]             // page 1 is not there

    // CR2 is the first byte in the faulting page.
    FAULT_PF "read crossing into a missing page", 0, r15, mov rax, [rsi]
    mov rax, 0x1111111111111111
    mov [frames + 0xff8], rax
    not rax
    FAULT_PF "write crossing into a missing page", 2, r15, mov [rsi], rax
    mov rax, 0x1111111111111111
    CHECK "no part of it was written", "qword ptr [frames + 0xff8]", rax
    FAULT_PF "add m crossing", 2, r15, add [rsi], rax
    CHECK "add m: nothing written", "qword ptr [frames + 0xff8]", rax
    movq xmm0, rax
    pcmpeqd xmm1, xmm1
    FAULT_PF "movups store crossing", 2, r15, movups [rsi - 8], xmm1
    CHECK "movups: nothing written", "qword ptr [frames + 0xff8]", rax
    // First page missing, second there: CR2 is the address itself.
    lea rdi, [rbx + 0x1ffc]
    FAULT_PF "read crossing out of a missing page", 0, rdi, mov rax, [rdi]
    // Second page read-only: error code of that page.
    lea rdi, [rbx + 0x4ffc]
    lea r14, [rbx + 0x5000]
    FAULT_PF "write crossing into a read-only page", 3, r14, mov [rdi], rax
    // PUSH that crosses: RSP unchanged.
    mov rbp, rsp
    ARM 1f
    lea rsp, [rbx + 0x3004]
    mov qword ptr [t_pt + 16], 0
    invlpg [rbx + 0x2000]
    push -1
1:  CHECK "push crossing downwards: vector", "qword ptr [exc_vec]", 8
    mov rsp, rbp
    lea rax, [frames + 0x1000 + 3]
    mov [t_pt + 16], rax

    // A crossing access over two pages whose frames are not neighbours.
    mov dword ptr [frames + 0x1ffc], 0x44332211
    mov dword ptr [frames], 0x88776655
    mov rax, [rbx + 0x3ffc]
    mov rdx, 0x8877665544332211
    CHECK "read over frames that are not neighbours", rax, rdx
    mov rax, 0x0102030405060708
    mov [rbx + 0x3ffc], rax
    mov eax, [frames + 0x1ffc]
    CHECK "write over frames: low part", rax, 0x05060708
    mov eax, [frames]
    CHECK "write over frames: high part", rax, 0x01020304
    mov eax, 1
    lock xadd [rbx + 0x3ffe], eax
    mov eax, [frames]
    CHECK "locked access over frames: carry goes over", rax, 0x01020304
    mov ax, [frames + 0x1ffe]
    movzx eax, ax
    CHECK "locked access over frames: low part", rax, 0x0507
    movups xmm0, [rbx + 0x3ff8]
    movq rax, xmm0
    movhlps xmm0, xmm0
    movq rdx, xmm0
    shr rax, 32
    CHECK "movups over frames: low", rax, 0x05070708
    mov eax, edx
    CHECK "movups over frames: high", rax, 0x01020304

    // REP MOVSB that faults in the middle: registers say how far it came.
    mov rsi, offset frames
    lea rdi, [rbx + 0xff0]
    mov ecx, 0x20
    FAULT_PF "rep movsb into a missing page", 2, r15, rep movsb
    CHECK "rep movsb: rcx", rcx, 0x10
    CHECK "rep movsb: rdi", rdi, r15
    mov rsi, offset frames
    lea rdi, [rbx + 0xff4]
    mov ecx, 4
    FAULT_PF "rep movsq, element crossing", 2, r15, rep movsq
    CHECK "rep movsq: rcx", rcx, 3
    lea rax, [rbx + 0xffc]
    CHECK "rep movsq: rdi at the element", rdi, rax
    std
    lea rdi, [rbx + 0x2008]
    mov ecx, 0x10
    lea r13, [rbx + 0x1fff]
    ARM 1f
    rep stosb
1:  CHECK "rep stosb downwards: cr2", "qword ptr [exc_cr2]", r13
    CHECK "rep stosb downwards: rcx", rcx, 7
    cld

    // Strings over frames that are not neighbours, source and destination one byte apart.
    mov byte ptr [rbx + 0x3f00], 0x5a
    mov r8d, 2                          // the second time the pages are known
1:  mov rdi, offset frames
    xor eax, eax
    mov ecx, 0xe00 / 8
    rep stosq
    lea rsi, [rbx + 0x3f00]
    lea rdi, [rbx + 0x3f01]
    mov ecx, 0x400
    rep movsb
    lea rdi, [rbx + 0x3f00]
    mov ecx, 0x1000
    mov eax, 0x5a
    repe scasb
    lea rax, [rbx + 0x4302]
    CHECK "rep movsb onto its next byte: all the same", rdi, rax
    CHECK "rep movsb onto its next byte: rcx of repe scasb", rcx, 0xbfe
    dec r8d
    jnz 1b
    // A long comparison that faults has the flags from before it.
    lea rsi, [rbx + 0x3000]
    lea rdi, [rbx + 0x3000]
    mov ecx, 0x5000
    mov r13, [t_pt + 40]
    mov qword ptr [t_pt + 40], 0
    invlpg [rbx + 0x5000]
    xor eax, eax
    ARM 1f
    cmp eax, 1                          // CF, SF, not ZF
    repe cmpsb
1:  mov rax, [exc_cr2]
    lea rdx, [rbx + 0x5000]
    CHECK "repe cmpsb: cr2", rax, rdx
    CHECK "repe cmpsb: rsi", rsi, rdx
    CHECK "repe cmpsb: rdi", rdi, rdx
    CHECK "repe cmpsb: rcx", rcx, 0x3000
    mov rax, [exc_rflags]
    and eax, 0xc1
    CHECK "repe cmpsb: flags", rax, 0x81
    // So has a short one, whose second element reaches into the missing page.
    lea rsi, [rbx + 0x4ffa]
    lea rdi, [rbx + 0x4ffa]
    mov ecx, 2
    mov al, [rsi]
    xor eax, eax
    ARM 1f
    cmp eax, 1
    repe cmpsd
1:  mov rax, [exc_cr2]
    lea rdx, [rbx + 0x5000]
    CHECK "repe cmpsd: cr2", rax, rdx
    lea rdx, [rbx + 0x4ffe]
    CHECK "repe cmpsd: rsi", rsi, rdx
    CHECK "repe cmpsd: rcx", rcx, 1
    mov rax, [exc_rflags]
    and eax, 0xc1
    CHECK "repe cmpsd: flags", rax, 0x81
    mov [t_pt + 40], r13

    // The same border crossed again and again, while what is behind it changes.
    lea rsi, [rbx + 0x3ffc]             // frames 1 and 0
    mov ecx, 100
    xor r8d, r8d
1:  mov [rsi], rcx
    add r8, [rsi]
    lock inc qword ptr [rsi]
    add r8, [rsi]
    dec ecx
    jnz 1b
    CHECK "100 times over a border", r8, 10200
    mov eax, [frames + 0x1ffc]
    CHECK "100 times over a border: low part", rax, 2
    mov dword ptr [frames + 0x2000], 0x77
    mov r13, [t_pt + 32]
    MAP 4, 2
    mov rax, [rsi]
    mov rdx, 0x7700000002
    CHECK "the second page is another", rax, rdx
    and qword ptr [t_pt + 32], ~2
    invlpg [rbx + 0x4000]
    lea r14, [rbx + 0x4000]
    FAULT_PF "the second page is read-only", 3, r14, mov [rsi], rax
    mov eax, [frames + 0x1ffc]
    CHECK "the second page is read-only: nothing written", rax, 2
    mov qword ptr [t_pt + 32], 0
    invlpg [rbx + 0x4000]
    FAULT_PF "the second page is gone", 0, r14, mov rax, [rsi]
    mov [t_pt + 32], r13
    and qword ptr [t_pt + 32], ~0x60
    invlpg [rbx + 0x4000]
    mov rax, [rsi]
    USED "the second page is back: accessed", 4, 0x20
    mov rdx, -1
    mov [rsi], rdx
    USED "the second page is back: dirty", 4, 0x60
    mov eax, [frames]
    mov edx, 0xffffffff
    CHECK "the second page is back: written", rax, rdx
    MAP 3, 2
    mov dword ptr [frames + 0x2ffc], 0x55
    mov rax, [rsi]
    mov rdx, 0xffffffff00000055
    CHECK "the first page is another", rax, rdx
    MAP 3, 1
    // Two accesses through one register, more than a page apart: pages 5 and 4, the base in page 3.
    mov qword ptr [frames], 0x1234
    mov qword ptr [frames + 8], 0x5678
    mov qword ptr [frames + 0x2000], 0x99
    mov ecx, 40
    xor r8d, r8d
    xor r9d, r9d
    lea rdi, [rbx + 0x3ff8]
    lea r12, [rbx + 0x3000]
1:  mov rax, [r12]
    mov rax, [rdi + 0x1008]
    mov rdx, [rdi + 0x10]
    add r8, rax
    add r9, rdx
    dec ecx
    jnz 1b
    CHECK "accesses more than a page above: the far one", r8, 0x2d820
    CHECK "accesses more than a page above: the near one", r9, 0xd82c0
    // Code on the second page, written by accesses over the border.
    mov word ptr [frames + 4], 0xc300
    mov ecx, 20
    xor r8d, r8d
1:  mov eax, ecx
    shl rax, 40
    mov rdx, 0xb800000000
    or rax, rdx
    mov [rsi], rax                      // at the second page: mov eax, ecx of now
    lea rdx, [rbx + 0x4000]
    call rdx
    add r8, rax
    dec ecx
    jnz 1b
    CHECK "code written over the border", r8, 210

    // Fetch crossing into a missing page: CR2 is the page, RIP the instruction.
    mov dword ptr [frames + 0xffc], 0x0000b890 // nop; mov eax, imm32 of which two bytes are there
    lea rdx, [rbx + 0xffd]
    ARM 1f
    jmp rdx
1:  CHECK "fetch crossing: vector", "qword ptr [exc_vec]", PF
    CHECK "fetch crossing: error code", "qword ptr [exc_err]", 0x10
    CHECK "fetch crossing: cr2", "qword ptr [exc_cr2]", r15
    CHECK "fetch crossing: rip", "qword ptr [exc_rip]", rdx
    // The same in straight-line code after an instruction that does something.
    mov dword ptr [frames + 0xff8], 0xb8c0ff48 // inc rax; mov eax, imm32 ...
    lea rdx, [rbx + 0xff8]
    mov byte ptr [frames + 0xffd], 0x00
    mov dword ptr [frames + 0xff8], 0x90c0ff48 // inc rax; nop
    mov dword ptr [frames + 0xffc], 0xb8c0ff48 // inc rax; b8 at the last byte
    xor eax, eax
    ARM 1f
    jmp rdx
1:  CHECK "block before a crossing instruction was executed", rax, 2
    lea rdx, [rbx + 0xfff]
    CHECK "rip of the crossing instruction", "qword ptr [exc_rip]", rdx
    // One page further mapped: it runs over the boundary of frames that are not neighbours.
    mov byte ptr [frames + 0x1fff], 0xb8
    mov dword ptr [frames], 0x12345678
    mov byte ptr [frames + 4], 0xc3
    lea rdx, [rbx + 0x3fff]
    call rdx
    CHECK "instruction over frames that are not neighbours", rax, 0x12345678
    // Its second part changes: by the other mapping.
    mov dword ptr [rbx], 0x76543210
    call rdx
    CHECK "second part changed through an alias", rax, 0x76543210
    mov byte ptr [frames + 0x1fff], 0xba // mov edx
    push rdx
    call rdx
    CHECK "first part changed through an alias", rdx, 0x76543210
    pop rdx
    // The mapping of the second page changes: same first page, other instruction end.
    mov byte ptr [frames + 0x1fff], 0xb8
    MAP 4, 2
    mov dword ptr [frames + 0x2000], 0x0badcafe
    mov byte ptr [frames + 0x2004], 0xc3
    call rdx
    CHECK "second page mapped elsewhere", rax, 0x0badcafe

    // Aliases: write through one, read and fetch through another.
    lea rsi, [rbx + 0x2000]
    lea rdi, [rbx + 0x3000]
    mov qword ptr [rsi + 0x100], 0x1234
    CHECK "data alias", "qword ptr [rdi + 0x100]", 0x1234
    lock inc qword ptr [rdi + 0x100]
    CHECK "data alias, locked", "qword ptr [rsi + 0x100]", 0x1235
    mov byte ptr [rsi], 0xb8
    mov dword ptr [rsi + 1], 1
    mov byte ptr [rsi + 5], 0xc3
    call rsi
    CHECK "code by one mapping", rax, 1
    mov dword ptr [rdi + 1], 2
    call rsi
    CHECK "code changed by the other mapping", rax, 2
    call rdi
    CHECK "code by the other mapping", rax, 2
    // Code mapping that is read-only for stores; writes go through the alias in a loop.
    and qword ptr [t_pt + 16], ~2
    invlpg [rsi]
    mov r12d, 100
    xor r11d, r11d
1:  mov [rdi + 1], r12d
    call rsi
    add r11d, eax
    dec r12d
    jnz 1b
    CHECK "100 changes through the alias, sum", r11, 5050
    // The virtual page is pointed at other code: the old block must not run.
    mov dword ptr [rdi], 0x000007b8
    mov word ptr [rdi + 4], 0xc300
    mov dword ptr [frames + 0x2000], 0x000009b8
    mov word ptr [frames + 0x2004], 0xc300
    call rsi
    CHECK "before remapping", rax, 7
    MAP 2, 2
    call rsi
    CHECK "after remapping", rax, 9
    lea rax, [frames + 0x1000 + 3]
    mov [t_pt + 16], rax
    mov rax, cr3
    mov cr3, rax
    call rsi
    CHECK "after mapping back", rax, 7
    ret
    .bss
    .align 4096
t_pdpt: .skip 4096
t_pd: .skip 4096
t_pt: .skip 4096
frames: .skip 0x3000
