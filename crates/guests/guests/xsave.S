// XSAVE, XSAVEC, XSAVEOPT, XRSTOR and XGETBV with what CPUID leaf 0xd promises: what is saved and
// restored, the header, the compacted format, what is refused.
// Intel SDM vol. 1, 13 (managing state using the XSAVE feature set).
#include "berth.inc"
    .text
    .globl main
main:
    mov eax, 1
    xor ecx, ecx
    cpuid
    bt ecx, 26
    jc 1f
    SKIP "all of it", "no XSAVE"
    ret
1:  mov rax, cr4
    or rax, CR4_OSXSAVE | CR4_OSFXSR | CR4_OSXMMEXCPT
    mov cr4, rax
    mov eax, 1
    xor ecx, ecx
    cpuid
    shr ecx, 27
    and ecx, 1
    CHECK "OSXSAVE shows CR4", rcx, 1
    mov eax, 0xd
    xor ecx, ecx
    cpuid
    and eax, 3
    CHECK "x87 and SSE can be saved", rax, 3
    xor ecx, ecx
    mov eax, 3
    xor edx, edx
    xsetbv
    xor ecx, ecx
    xgetbv
    CHECK "xgetbv is what xsetbv set", rax, 3
    mov eax, 0xd
    xor ecx, ecx
    cpuid
    CHECK "the area for x87 and SSE has 576 bytes", rbx, 576

    // Save, destroy, restore.
    mov rax, 0x1122334455667788
    movq xmm3, rax
    mov dword ptr [mxcsr], 0x1fa0
    ldmxcsr [mxcsr]
    fninit
    fld1
    mov rdi, offset area
    mov ecx, 72
    mov rax, -1
    rep stosq
    mov qword ptr [area + 512], 0
    mov eax, 3
    xor edx, edx
    xsave [area]
    mov rax, [area + 512]
    CHECK "header: x87 and SSE are in use", rax, 3
    mov rax, [area + 160 + 48]
    mov rdx, 0x1122334455667788
    CHECK "xmm3 is in its place", rax, rdx
    mov eax, [area + 24]
    CHECK "mxcsr is in its place", rax, 0x1fa0
    mov rax, [area + 520]
    CHECK "the rest of the header is left alone", rax, -1
    pxor xmm3, xmm3
    mov dword ptr [mxcsr], 0x1f80
    ldmxcsr [mxcsr]
    fninit
    mov qword ptr [area + 520], 0
    mov qword ptr [area + 528], 0
    mov rdi, offset area + 536
    mov ecx, 5
    xor eax, eax
    rep stosq
    mov eax, 2
    xor edx, edx
    xrstor [area]
    movq rax, xmm3
    CHECK "xrstor of SSE: xmm3", rax, "qword ptr [kept]"
    stmxcsr [mxcsr]
    mov eax, [mxcsr]
    CHECK "xrstor of SSE: mxcsr", rax, 0x1fa0
    fnstsw ax
    and eax, 0x3800
    CHECK "xrstor of SSE: x87 is left alone", rax, 0
    mov eax, 1
    xor edx, edx
    xrstor [area]
    fnstsw ax
    and eax, 0x3800
    CHECK "xrstor of x87: top", rax, 0x3800
    // A component that is clear in the header gets its initial state.
    mov qword ptr [area + 512], 1
    mov eax, 3
    xor edx, edx
    xrstor [area]
    movq rax, xmm3
    CHECK "xrstor: SSE initial", rax, 0
    mov eax, 3
    xor edx, edx
    mov qword ptr [area + 512], 1 << 5
    FAULT "xrstor: a component that XCR0 has not", GP, 0, xrstor [area]
    mov qword ptr [area + 512], 3
    mov qword ptr [area + 528], 1
    FAULT "xrstor: a reserved byte of the header", GP, 0, xrstor [area]
    mov qword ptr [area + 528], 0
    FAULT "xsave: unaligned", GP, 0, xsave [area + 8]
    FAULT "xrstor: unaligned", GP, 0, xrstor [area + 8]
    mov rax, cr0
    or rax, CR0_TS
    mov cr0, rax
    mov eax, 3
    FAULT "xsave: CR0.TS", NM, 0, xsave [area]
    FAULT "xrstor: CR0.TS", NM, 0, xrstor [area]
    clts
    mov rax, cr4
    and rax, ~CR4_OSXSAVE
    mov cr4, rax
    FAULT "xsave: CR4.OSXSAVE clear", UD, 0, xsave [area]
    FAULT "xgetbv: CR4.OSXSAVE clear", UD, 0, xgetbv
    mov rax, cr4
    or rax, CR4_OSXSAVE
    mov cr4, rax

    mov eax, 0xd
    mov ecx, 1
    cpuid
    mov [features], eax
    mov rax, 0x1122334455667788
    movq xmm3, rax
    test dword ptr [features], 1
    jnz 1f
    SKIP "xsaveopt: xmm3", "no XSAVEOPT"
    jmp 2f
1:  mov qword ptr [area + 160 + 48], 0
    mov qword ptr [area + 512], 0
    mov eax, 3
    xor edx, edx
    xsaveopt [area]
    mov rax, [area + 160 + 48]
    CHECK "xsaveopt: xmm3", rax, "qword ptr [kept]"
2:  test dword ptr [features], 2
    jnz 1f
    SKIP "xsavec: header", "no XSAVEC"
    SKIP "xsavec: format", "no XSAVEC"
    SKIP "xsavec: xmm3", "no XSAVEC"
    SKIP "xrstor of the compacted format", "no XSAVEC"
    ret
1:  mov eax, 2
    xor edx, edx
    xsavec [area]
    mov rax, [area + 512]
    CHECK "xsavec: header", rax, 2
    mov rax, [area + 520]
    mov rdx, 0x8000000000000002
    CHECK "xsavec: format", rax, rdx
    mov rax, [area + 160 + 48]
    CHECK "xsavec: xmm3", rax, "qword ptr [kept]"
    pxor xmm3, xmm3
    mov eax, 2
    xor edx, edx
    xrstor [area]
    movq rax, xmm3
    CHECK "xrstor of the compacted format", rax, "qword ptr [kept]"
    ret

    .bss
    .align 64
area: .skip 1024
mxcsr: .skip 4
features: .skip 4
    .data
kept: .quad 0x1122334455667788
