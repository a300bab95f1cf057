// Leaving long mode for 32-bit protected, 16-bit protected and real mode and coming back; real mode
// code, unreal segments, segment limits, 32-bit paging (two levels with PSE, and PAE).
// Results are stored by the excursion and checked in 64-bit mode.
// Intel SDM vol. 3, 9.8.5, 9.9, 20.1 (real mode), 4.3 (32-bit paging), 4.4 (PAE), 5.3 (limits).
#include "berth.inc"
    .text
    .globl main
#define REAL 0x9000                     /* page that real-mode code runs in */
#define SEG_SMALL 0x68                  /* data, limit 0xff */
#define SEG_DOWN  0x70                  /* expand-down, valid above 0xfff */
#define SEG_C16   0x78                  /* 16-bit code at REAL */
#define SEG_D16   0x80                  /* 16-bit data at REAL */
#define R(x) ((x) - real_begin)
    .macro RESULT name, n, want
    mov eax, [results + 4 * \n]
    mov edx, \want
    CHECK "\name", rax, rdx
    .endm
main:
    mov rax, 0x00409300000000ff
    mov [gdt + SEG_SMALL], rax
    mov rax, 0x0040970000000fff
    mov [gdt + SEG_DOWN], rax
    mov rax, 0x00009b009000ffff
    mov [gdt + SEG_C16], rax
    mov rax, 0x000093009000ffff
    mov [gdt + SEG_D16], rax
    mov rsi, offset real_begin
    mov edi, REAL
    mov ecx, offset real_end - real_begin
    rep movsb
    mov qword ptr [rounds], 2
again:
    LEAVE_LONG
    mov [results], edi
    mov eax, cr0
    and eax, 0x80000001
    mov [results + 4], eax

    // Segment limits: #GP(0) for data, #SS(0) for the stack; expand-down; wrap at 4 GiB.
    .macro F32 n, insn:vararg
    mov dword ptr [vec32], 0xff
    mov dword ptr [fix32], offset .Lf\@
    mov [esp32], esp
    \insn
.Lf\@:
    mov esp, [esp32]
    mov eax, [vec32]
    mov [results + 4 * \n], eax
    .endm
    mov ax, SEG_SMALL
    mov es, ax
    F32 2, mov al, es:[0xff]
    F32 3, mov al, es:[0x100]
    F32 4, mov eax, es:[0xfd]
    F32 5, mov eax, es:[0xfc]
    mov ax, SEG_DOWN
    mov es, ax
    F32 6, mov al, es:[0xfff]
    F32 7, mov al, es:[0x1000]
    xor eax, eax
    mov es, ax
    F32 8, mov al, es:[0]               // null selector
    mov ax, KCS32
    mov es, ax
    F32 9, mov es:[0], al               // code segments are not writable
    F32 10, mov cs:[stack32], al
    // Stack segment of limit 0xff: push below and above.
    mov ax, SEG_SMALL
    mov ebx, esp
    mov dword ptr [vec32], 0xff
    mov dword ptr [fix32], offset 1f
    mov [esp32], ebx
    mov ss, ax
    mov esp, 0xf0                       // the exception's frame must fit as well
    mov ebp, 0x200
    mov al, [ebp]
1:  mov ax, KDS
    mov ss, ax
    mov esp, [esp32]
    mov eax, [vec32]
    mov [results + 44], eax
    // Instructions of 32-bit mode that 64-bit mode has not.
    mov eax, 0x00000008
    add al, 5
    daa
    mov [results + 48], eax
    mov ax, 0x0109
    aad
    mov [results + 52], eax
    push 0x11
    push 0x22
    mov eax, 1
    mov ecx, 2
    mov edx, 3
    mov ebx, 4
    mov ebp, 5
    mov esi, 6
    mov edi, 7
    pushad
    xor eax, eax
    popad
    lea eax, [eax+ecx*2]
    add eax, edi
    mov [results + 56], eax
    add esp, 8
    inc eax
    push ds
    pop es
    lds esi, [far32]
    mov [results + 60], esi
    mov ax, KDS
    mov ds, ax
    // INT through a 32-bit gate and IRETD; frame of three dwords.
    mov ebx, esp
    int 0x20
    mov [results + 64], eax

    // 32-bit paging with PSE: identity by 4 MiB pages, one page of its own with A and D bits.
    mov edi, offset pd32
    mov eax, 0x83
    mov ecx, 1024
1:  mov [edi], eax
    add edi, 4
    add eax, 0x400000
    loop 1b
    mov eax, offset pt32 + 3
    mov [pd32 + 4 * 512], eax           // 2 GiB
    mov dword ptr [pt32], offset frame32 + 3
    mov dword ptr [pt32 + 4], offset frame32 + 1
    mov dword ptr [pt32 + 8], 0
    mov eax, CR4_PSE
    mov cr4, eax
    mov eax, offset pd32
    mov cr3, eax
    mov eax, cr0
    or eax, CR0_PG | CR0_WP
    mov cr0, eax
    jmp 1f
1:  mov dword ptr [0x80000010], 0x600d
    mov eax, [frame32 + 0x10]
    mov [results + 68], eax
    mov eax, [pt32]
    and eax, 0x60
    mov [results + 72], eax
    mov eax, [pd32 + 4 * 512]
    and eax, 0x60
    mov [results + 76], eax
    F32 20, mov [0x80001000], eax
    mov eax, [err32]
    mov [results + 84], eax
    mov eax, cr2
    mov [results + 88], eax
    F32 23, mov eax, [0x80002004]
    mov eax, [err32]
    mov [results + 96], eax
    mov eax, [pd32]                     // 4 MiB page: accessed and dirty (our code and data)
    and eax, 0x60
    mov [results + 100], eax
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    // PAE: four directories from the PDPT, 2 MiB pages, one page with XD.
    mov edi, offset pd_pae
    mov eax, 0x83
    mov ecx, 4 * 512
1:  mov [edi], eax
    mov dword ptr [edi + 4], 0
    add edi, 8
    add eax, 0x200000
    loop 1b
    mov eax, offset pt32 + 3
    mov [pd_pae + 8 * 1024], eax        // 2 GiB
    mov dword ptr [pt32], offset frame32 + 3
    mov dword ptr [pt32 + 4], 0
    mov dword ptr [pt32 + 8], offset frame32 + 3
    mov dword ptr [pt32 + 12], 0x80000000
    mov edi, offset pdpt_pae
    mov eax, offset pd_pae + 1
    mov ecx, 4
1:  mov [edi], eax
    mov dword ptr [edi + 4], 0
    add eax, 4096
    add edi, 8
    loop 1b
    mov eax, CR4_PAE
    mov cr4, eax
    mov eax, offset pdpt_pae
    mov cr3, eax
    mov eax, cr0
    or eax, CR0_PG
    mov cr0, eax
    jmp 1f
1:  mov dword ptr [0x80000020], 0xfae
    mov eax, [frame32 + 0x20]
    mov [results + 104], eax
    mov eax, [pt32]
    and eax, 0x60
    mov [results + 108], eax
    mov byte ptr [frame32], 0xc3
    mov edx, 0x80001000
    F32 28, call edx
    mov eax, [err32]
    mov [results + 116], eax
    // PDPTEs are loaded by MOV CR3: one with a reserved bit is #GP(0).
    mov edi, offset pdpt_pae
    or dword ptr [edi + 16], 0x20
    mov eax, cr3
    F32 30, mov cr3, eax
    and dword ptr [edi + 16], ~0x20
    // The PDPTE registers are a copy: a cleared entry in memory counts only after MOV CR3.
    and dword ptr [edi + 16], ~1
    invlpg [0x80000020]
    F32 31, mov eax, [0x80000020]
    mov eax, cr3
    mov cr3, eax
    F32 32, mov eax, [0x80000020]
    or dword ptr [edi + 16], 1
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax

    // 16-bit protected mode, then real mode.
    lidt [ivt_ptr]
    mov ax, SEG_D16
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0xffe
    // unreal: a 4 GiB limit stays in FS when PE is cleared
    mov bx, KDS
    mov fs, bx
    jmp SEG_C16:R(prot16)

    // Real mode again -> 32-bit protected mode -> long mode.
from_real:
    mov ax, KDS
    mov ds, ax
    mov es, ax
    mov ss, ax
    xor eax, eax
    mov fs, ax
    mov gs, ax
    mov esi, REAL + R(real_results)
    mov edi, offset results + 200
    mov ecx, 40
    rep movsd
    mov esp, offset stack32
    ENTER_LONG
    LONG_AGAIN
    dec qword ptr [rounds]
    jnz again                           // all of it twice
    RESULT "LMA clear after paging off", 0, 0x901
    RESULT "PG clear, PE set", 1, 1
    RESULT "limit: last byte", 2, 0xff
    RESULT "limit: byte behind", 3, GP
    RESULT "limit: dword over it", 4, GP
    RESULT "limit: last dword", 5, 0xff
    RESULT "expand-down: below", 6, GP
    RESULT "expand-down: inside", 7, 0xff
    RESULT "null selector", 8, GP
    RESULT "write through a code selector", 9, GP
    RESULT "write through cs", 10, GP
    RESULT "stack segment limit by ebp", 11, SS_
    RESULT "daa", 12, 0x13
    RESULT "aad", 13, 19
    RESULT "pushad, popad", 14, 12
    RESULT "lds: offset", 15, 0x1234
    RESULT "int in 32-bit mode: frame of 12 bytes", 16, 12
    RESULT "32-bit paging: alias", 17, 0x600d
    RESULT "32-bit paging: PTE accessed, dirty", 18, 0x60
    RESULT "32-bit paging: PDE accessed", 19, 0x20
    RESULT "32-bit paging: write to a read-only page", 20, PF
    RESULT "32-bit paging: its error code", 21, 3
    RESULT "32-bit paging: cr2", 22, 0x80001000
    RESULT "32-bit paging: not present", 23, PF
    RESULT "32-bit paging: its error code, not present", 24, 0
    RESULT "4 MiB page: accessed, dirty", 25, 0x60
    RESULT "PAE: alias", 26, 0xfae
    RESULT "PAE: accessed, dirty", 27, 0x60
    RESULT "PAE: fetch from an XD page needs NXE", 28, PF
    RESULT "PAE: its error code", 29, 0x11
    RESULT "PAE: mov cr3 with a reserved PDPTE bit", 30, GP
    RESULT "PAE: PDPTE in memory cleared, registers not reloaded", 31, 0xff
    RESULT "PAE: after mov cr3", 32, PF
    RESULT "16-bit protected: push is 2 bytes", 50, 2
    RESULT "16-bit protected: 32-bit operand by prefix", 51, 0x12345678
    RESULT "real: cs after the far jump", 52, 0x900
    RESULT "real: 16-bit wrap of an address", 53, 0xaa
    RESULT "real: int through the IVT, iret", 54, 0x77
    RESULT "real: int pushes 6 bytes", 55, 6
    RESULT "real: unreal fs reaches 1 MiB and more", 56, 1
    RESULT "real: loads of ds change base, not limit", 57, 1
    RESULT "real: string copy with wrapping si", 58, 0x4241
    RESULT "real: 67 prefix, scaled index", 59, 0x5566
    RESULT "real: far call and retf", 60, 0x99
    RESULT "real: lahf after 16-bit add carry", 61, 0x57
    RESULT "real: divide error through vector 0", 62, 0x42
    RESULT "real: saved ip of the divide error", 63, 1
    RESULT "real: pushf, popf 16 bits", 64, 0x3002
    RESULT "real: smsw PE clear", 65, 0
    RESULT "real: loop with 16-bit counter", 66, 0
    RESULT "real: ud2 through vector 6", 67, 0x43
    RESULT "real: word at offset 0xffff faults", 68, 0x44
    ret

    .code32
    .macro STUB32 v, code
stub32_\v:
    .ifeq \code
    push 0
    .endif
    push \v
    jmp common32
    .endm
    STUB32 6, 0
    STUB32 12, 1
    STUB32 13, 1
    STUB32 14, 1
    STUB32 0, 0
common32:
    pop dword ptr [vec32]
    pop dword ptr [err32]
    push eax
    mov eax, [fix32]
    mov [esp + 4], eax
    pop eax
    iretd
int20:
    mov eax, ebx                        // ESP before the INT
    sub eax, esp
    iretd
    .code64
    .data
    .align 8
far32: .long 0x1234
    .word KDS
ivt_ptr: .word 0x3ff
    .long 0
    .align 8
idt32:
    .macro G32 to
    .word \to - 0x100000
    .word KCS32, 0x8e00, 0x10
    .endm
    G32 stub32_0
    .rept 5
    .quad 0
    .endr
    G32 stub32_6
    .rept 5
    .quad 0
    .endr
    G32 stub32_12
    G32 stub32_13
    G32 stub32_14
    .rept 17
    .quad 0
    .endr
    G32 int20
idt32_ptr: .word . - idt32 - 1
    .long idt32

    // ---- copied to REAL ----
    .text
    .code16
    .macro RR n                         // stores AX/EAX as result \n (of those from 50 on)
    mov ds:[R(real_results) + 4 * (\n - 50)], eax
    .endm
    .align 16
real_begin:
prot16:
    xor eax, eax
    mov ax, sp
    push ax
    sub ax, sp
    pop bx
    RR 50
    mov eax, 0x12345678
    RR 51
    mov eax, cr0
    and eax, ~1
    mov cr0, eax
    .byte 0xea                          // jmp REAL>>4 : realmode
    .word R(realmode), REAL >> 4
realmode:
    mov ax, REAL >> 4
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0xffe
    xor eax, eax
    mov ax, cs
    RR 52
    // [bx + 0xffff] with bx = 2 is offset 1 of the segment.
    mov byte ptr [R(byte_at_1)], 0
    mov bx, R(byte_aa) + 1
    xor eax, eax
    mov al, [bx + 0xffff]
    RR 53
    // Vectors: IVT at 0 (ES = 0).
    xor bx, bx
    mov es, bx
    mov word ptr es:[0x60 * 4], R(on60)
    mov word ptr es:[0x60 * 4 + 2], REAL >> 4
    mov word ptr es:[0], R(on0)
    mov word ptr es:[2], REAL >> 4
    mov word ptr es:[6 * 4], R(on6)
    mov word ptr es:[6 * 4 + 2], REAL >> 4
    mov word ptr es:[13 * 4], R(on13)
    mov word ptr es:[13 * 4 + 2], REAL >> 4
    xor eax, eax
    mov bp, sp
    int 0x60
    RR 54
    xor eax, eax
    mov ax, cx
    RR 55
    // unreal
    mov ebx, 0x100000
    mov ecx, fs:[ebx]
    xor eax, eax
    cmp ecx, 0x464c457f                 // anything: the read just must not fault
    mov al, 1
    RR 56
    xor eax, eax
    mov bx, (REAL >> 4) + 1
    mov es, bx
    mov bx, es:[R(byte_aa) - 16]
    cmp bl, 0xaa
    sete al
    RR 57
    // lodsb at si = 0xffff goes on at 0: copy two bytes.
    mov bx, 0x2000
    mov es, bx
    mov byte ptr es:[0xffff], 0x41
    mov byte ptr es:[0], 0x42
    push ds
    mov ds, bx
    mov si, 0xffff
    mov di, 0x100
    mov cx, 2
    cld
    rep movsb
    pop ds
    xor eax, eax
    mov ax, es:[0x100]
    RR 58
    mov word ptr [R(table) + 6], 0x5566
    mov ebx, R(table)
    mov ecx, 3
    xor eax, eax
    mov ax, [ebx+ecx*2]
    RR 59
    xor eax, eax
    .byte 0x9a
    .word R(farproc), REAL >> 4
    RR 60
    xor eax, eax
    mov ax, 0xffff
    add ax, 1
    lahf
    shr ax, 8
    RR 61
    // divide error; the handler moves IP over the two bytes
    xor eax, eax
    xor cx, cx
    mov dx, 1
div0:
    div cx
    mov bx, ax
    xor eax, eax
    mov ax, bx
    RR 62
    xor eax, eax
    mov ax, [R(div_ip)]
    sub ax, R(div0)
    setz al
    and eax, 0xff
    RR 63
    push 0x3002
    popf
    pushf
    xor eax, eax
    pop ax
    RR 64
    push 2
    popf
    smsw ax
    and eax, 1
    RR 65
    mov ecx, 0x00010003
    xor eax, eax
1:  inc ax
    loop 1b
    sub ax, 3
    RR 66
    xor eax, eax
    ud2
    RR 67
    xor eax, eax
    mov bx, 0xffff
at13:
    mov cx, [bx]                        // 2 bytes (8b 0f)
    RR 68
    // back: PE on, 32-bit code
    lgdt [R(gdt16)]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea
    .long from_real
    .word KCS32
on60:
    mov cx, bp
    sub cx, sp
    mov ax, 0x77
    iret
on0:
    mov bp, sp
    mov ax, [bp]
    mov [R(div_ip)], ax
    add word ptr [bp], 2
    mov ax, 0x42
    iret
on6:
    mov bp, sp
    add word ptr [bp], 2
    mov ax, 0x43
    iret
on13:
    mov bp, sp
    add word ptr [bp], 2
    mov ax, 0x44
    iret
farproc:
    mov ax, 0x99
    retf
byte_at_1: .byte 0
byte_aa: .byte 0xaa
    .align 4
div_ip: .word 0, 0
table: .skip 16
gdt16: .word GDT_END - 1
    .long gdt
    .align 4
real_results: .skip 160
real_end:
    .code64

    .bss
    .align 4096
pd32: .skip 4096
pt32: .skip 4096
frame32: .skip 4096
pd_pae: .skip 4 * 4096
pdpt_pae: .skip 64
results: .skip 512
rounds: .skip 8
vec32: .skip 4
err32: .skip 4
fix32: .skip 4
esp32: .skip 4
    .skip 4096
stack32: .skip 16
