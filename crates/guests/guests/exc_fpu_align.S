// #NM, #MF, #XM, #AC. Intel SDM vol. 3, 2.5 (CR0.TS, EM, MP, NE, AM), 6.15; vol. 1, 8.7, 11.5.
#include "berth.inc"
    .text
    .globl main
    .macro CR0_SET bits
    mov rax, cr0
    or rax, \bits
    mov cr0, rax
    .endm
    .macro CR0_CLEAR bits
    mov rax, cr0
    and rax, ~(\bits)
    mov cr0, rax
    .endm
main:
    // TS: x87, MMX, SSE raise #NM; FNINIT too; integer code does not.
    CR0_SET CR0_TS
    FAULT "ts: fld1", NM, 0, fld1
    FAULT "ts: fninit", NM, 0, fninit
    FAULT "ts: fwait with MP", NM, 0, fwait
    FAULT "ts: emms", NM, 0, emms
    FAULT "ts: paddb mm", NM, 0, paddb mm0, mm1
    FAULT "ts: addps", NM, 0, addps xmm0, xmm1
    FAULT "ts: movdqa", NM, 0, movdqa xmm0, xmm1
    FAULT "ts: fxsave", NM, 0, fxsave [area]
    FAULT "ts: ldmxcsr", NM, 0, ldmxcsr [area]
    FINE "ts: movnti is not SSE state", movnti [area], rax
    FINE "ts: sfence", sfence
    // #NM comes before the memory operand's fault.
    mov rsi, 0x4000000000
    FAULT "ts: movaps from a missing page is #NM", NM, 0, movaps xmm0, [rsi]
    CR0_CLEAR CR0_MP
    FINE "ts: fwait without MP", fwait
    CR0_SET CR0_MP
    clts
    FINE "clts: addps", addps xmm0, xmm1
    FINE "ts clear, mp set: fwait", fwait
    // EM: x87 raises #NM, MMX and SSE #UD.
    CR0_SET CR0_EM
    FAULT "em: fld1", NM, 0, fld1
    FAULT "em: emms", UD, 0, emms
    FAULT "em: addps", UD, 0, addps xmm0, xmm1
    FINE "em: fwait", fwait
    CR0_CLEAR CR0_EM

    // #MF: pending x87 error is reported by the next waiting x87 instruction (CR0.NE).
    fninit
    fldcw [cw_unmask]
    fld1
    fldz
    fdivp
    FAULT "mf: fld1 after 1/0", MF, 0, fld1
    FAULT "mf: fwait", MF, 0, fwait
    FAULT "mf: emms", MF, 0, emms
    FINE "mf: fnstsw does not wait", fnstsw ax
    and eax, 0x84
    CHECK "mf: ZE and ES in the status word", rax, 0x84
    fnclex
    FINE "mf: gone after fnclex", fwait
    fninit

    // #XM: unmasked SSE error is reported by the instruction itself, the target unchanged.
    mov dword ptr [area], 0x1f80 & ~0x200
    ldmxcsr [area]
    mov eax, 0x3f800000
    movd xmm0, eax
    pxor xmm1, xmm1
    FAULT "xm: divss by 0", XM, 0, divss xmm0, xmm1
    movd edx, xmm0
    CHECK "xm: target unchanged", rdx, 0x3f800000
    stmxcsr [area]
    mov edx, [area]
    and edx, 0x3f
    CHECK "xm: flag ZE set", rdx, 4
    // Without CR4.OSXMMEXCPT it is #UD.
    mov rax, cr4
    btr rax, 10
    mov cr4, rax
    FAULT "xm: without OSXMMEXCPT", UD, 0, divss xmm0, xmm1
    mov rax, cr4
    bts rax, 10
    mov cr4, rax
    mov dword ptr [area], 0x1f80
    ldmxcsr [area]

    // #AC(0) at CPL 3 with CR0.AM and EFLAGS.AC; never at CPL 0 (6.15, interrupt 17).
    CR0_SET CR0_AM
    push FL_AC | 2
    popfq
    FINE "ac: CPL 0 does not check", mov eax, [area + 1]
    push 2
    popfq
    .macro ALIGN_ name, vec, insn:vararg
    USER_SECTION
.Lu\@: \insn
    int 0x80
    END_SECTION
    mov rsi, offset udata
    mov rdi, offset .Lu\@
    call call_user
    .if \vec == AC
    CHECK_EXC "\name", AC, 0, .Lu\@
    .else
    CHECK_EXC "\name", \vec, 0
    .endif
    .endm
    mov qword ptr [user_flags], FL_AC | 2
    ALIGN_ "ac: dword at 1", AC, mov eax, [rsi + 1]
    ALIGN_ "ac: dword at 2", AC, mov [rsi + 2], eax
    ALIGN_ "ac: word at 1", AC, mov ax, [rsi + 1]
    ALIGN_ "ac: word at 2", NONE, mov ax, [rsi + 2]
    ALIGN_ "ac: byte at 1", NONE, mov al, [rsi + 1]
    ALIGN_ "ac: qword at 4", AC, mov rax, [rsi + 4]
    ALIGN_ "ac: qword at 8", NONE, mov rax, [rsi + 8]
    ALIGN_ "ac: lock inc at 2", AC, lock inc dword ptr [rsi + 2]
    ALIGN_ "ac: fld m64 at 4", AC, fld qword ptr [rsi + 4]
    ALIGN_ "ac: movups at 16", NONE, movups xmm0, [rsi + 16]
    mov qword ptr [user_flags], 2
    ALIGN_ "ac: flag clear", NONE, mov eax, [rsi + 1]
    CR0_CLEAR CR0_AM
    mov qword ptr [user_flags], FL_AC | 2
    ALIGN_ "ac: AM clear", NONE, mov eax, [rsi + 1]
    mov qword ptr [user_flags], 2
    ret
    USER_SECTION
    .align 64
udata: .skip 64
    END_SECTION
    .data
    .align 64
area: .skip 512
cw_unmask: .word 0x37b
