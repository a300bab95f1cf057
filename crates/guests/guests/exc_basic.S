// Vectors that single instructions raise: #DE, #DB (INT1), #BP, #OF, #BR, #UD, #DF.
// Intel SDM vol. 3, 6.15 (exception reference) and vol. 2 for each instruction.
#include "berth.inc"
    .text
    .globl main
main:
    // #DE: a fault; quotient too large or divisor 0 (vol. 2, DIV, IDIV).
    xor ecx, ecx
    mov eax, 5
    xor edx, edx
    FAULT "de: div r32 by 0", DE, 0, div ecx
    CHECK "de: div by 0 leaves rax", rax, 5
    mov eax, 0x1234
    FAULT "de: div r8 by 0", DE, 0, div cl
    mov eax, 0x1000
    mov cl, 2
    FAULT "de: div r8 quotient 0x800", DE, 0, div cl
    mov eax, 0xff
    mov cl, 1
    FINE "de: div r8 quotient 0xff", div cl
    mov edx, 1
    xor eax, eax
    mov ecx, 1
    FAULT "de: div r32 overflow", DE, 0, div ecx
    FAULT "de: div r64 overflow", DE, 0, div rcx
    CHECK "de: div overflow leaves rdx", rdx, 1
    mov rax, 0x8000000000000000
    cqo
    mov rcx, -1
    FAULT "de: idiv r64 min by -1", DE, 0, idiv rcx
    mov eax, 0x80000000
    cdq
    FAULT "de: idiv r32 min by -1", DE, 0, idiv ecx
    mov eax, 0x8000
    cwd
    FAULT "de: idiv r16 min by -1", DE, 0, idiv cx
    mov eax, 0xff80
    FAULT "de: idiv r8 min by -1", DE, 0, idiv cl
    mov qword ptr [scratch], 0
    mov eax, 1
    xor edx, edx
    FAULT "de: div m64 by 0", DE, 0, div qword ptr [scratch]
    FAULT "de: idiv m16 by 0", DE, 0, idiv word ptr [scratch]

    // INT1 (vol. 2, INT n): #DB as a trap, no DR6 bit defined for it.
    TRAP "db: int1", DB, 0, .byte 0xf1
    // #BP: trap; saved RIP after the one-byte and two-byte forms.
    TRAP "bp: int3", BP, 0, int3
    TRAP "bp: int 3 (CD 03)", BP, 0, .byte 0xcd, 3
    TRAP "int 0x85", 0x85, 0, int 0x85
    // INT n pushes no error code, even for vectors that have one as exceptions.
    ARM 1f
    mov rbx, rsp
    and rsp, -16
    int 0x81
1:  mov rax, [exc_rsp]
    sub rax, [exc_frame]
    // frame: 5 words and our 17; RSP was aligned
    CHECK "int n: frame is five quadwords", rax, 22*8

    // #UD: fault (vol. 3, 6.15).
    FAULT "ud: ud2", UD, 0, ud2
    FAULT "ud: ud1", UD, 0, .byte 0x0f, 0xb9, 0xc0
    FAULT "ud: ud0", UD, 0, .byte 0x0f, 0xff, 0xc0
    FAULT "ud: lock mov r,r", UD, 0, .byte 0xf0, 0x89, 0xc0
    FAULT "ud: lock add r,r", UD, 0, .byte 0xf0, 0x01, 0xc0
    FAULT "ud: lock mov m,r", UD, 0, .byte 0xf0, 0x89, 0x00
    FAULT "ud: lock cmp m,r", UD, 0, .byte 0xf0, 0x39, 0x00
    FAULT "ud: lock add r,m", UD, 0, .byte 0xf0, 0x03, 0x00
    FAULT "ud: lock shl m,1", UD, 0, .byte 0xf0, 0xd1, 0x20
    FAULT "ud: lock bt m,imm", UD, 0, .byte 0xf0, 0x0f, 0xba, 0x20, 0x00
    FAULT "ud: lock nop", UD, 0, .byte 0xf0, 0x90
    FAULT "ud: lock test m,r", UD, 0, .byte 0xf0, 0x85, 0x00
    // Opcodes invalid in 64-bit mode (vol. 2, appendix A).
    FAULT "ud: push es (06)", UD, 0, .byte 0x06
    FAULT "ud: pop es (07)", UD, 0, .byte 0x07
    FAULT "ud: push cs (0e)", UD, 0, .byte 0x0e
    FAULT "ud: daa (27)", UD, 0, .byte 0x27
    FAULT "ud: das (2f)", UD, 0, .byte 0x2f
    FAULT "ud: aaa (37)", UD, 0, .byte 0x37
    FAULT "ud: aas (3f)", UD, 0, .byte 0x3f
    FAULT "ud: pusha (60)", UD, 0, .byte 0x60
    FAULT "ud: popa (61)", UD, 0, .byte 0x61
    FAULT "ud: 82 alias", UD, 0, .byte 0x82, 0xc0, 0x01
    FAULT "ud: far call imm (9a)", UD, 0, .byte 0x9a, 0, 0, 0, 0, 0, 0
    FAULT "ud: far jmp imm (ea)", UD, 0, .byte 0xea, 0, 0, 0, 0, 0, 0
    FAULT "ud: aam (d4)", UD, 0, .byte 0xd4, 0x0a
    FAULT "ud: aad (d5)", UD, 0, .byte 0xd5, 0x0a
    FAULT "ud: salc (d6)", UD, 0, .byte 0xd6
    FAULT "ud: into (ce)", UD, 0, .byte 0xce
    // Register forms that do not exist.
    FAULT "ud: lea r,r", UD, 0, .byte 0x8d, 0xc0
    FAULT "ud: mov cs,ax", UD, 0, .byte 0x8e, 0xc8
    FAULT "ud: mov sreg 6", UD, 0, .byte 0x8e, 0xf0
    FAULT "ud: mov sreg 7,store", UD, 0, .byte 0x8c, 0xf8
    FAULT "ud: lgdt r", UD, 0, .byte 0x0f, 0x01, 0xd6
    FAULT "ud: far jmp r (ff /5)", UD, 0, .byte 0xff, 0xe8
    FAULT "ud: far call r (ff /3)", UD, 0, .byte 0xff, 0xd8
    FAULT "ud: ff /7", UD, 0, .byte 0xff, 0xf8
    FAULT "ud: fe /2", UD, 0, .byte 0xfe, 0xd0
    FAULT "ud: c6 /1", UD, 0, .byte 0xc6, 0xc8, 0
    FAULT "ud: 8f /1", UD, 0, .byte 0x8f, 0xc8
    FAULT "ud: 0f ba /0", UD, 0, .byte 0x0f, 0xba, 0xc0, 0
    FAULT "ud: cmpxchg8b r", UD, 0, .byte 0x0f, 0xc7, 0xc8
    FAULT "ud: lss r,r", UD, 0, .byte 0x0f, 0xb2, 0xc0
    FAULT "ud: movnti r,r", UD, 0, .byte 0x0f, 0xc3, 0xc0
    FAULT "ud: movntps r,r", UD, 0, .byte 0x0f, 0x2b, 0xc0
    // Registers that do not exist (vol. 2, MOV to/from CRn and DRn).
    FAULT "ud: mov rax,cr1", UD, 0, .byte 0x0f, 0x20, 0xc8
    FAULT "ud: mov rax,cr5", UD, 0, .byte 0x0f, 0x20, 0xe8
    FAULT "ud: mov cr6,rax", UD, 0, .byte 0x0f, 0x22, 0xf0
    FAULT "ud: mov rax,cr7", UD, 0, .byte 0x0f, 0x20, 0xf8
    FAULT "ud: mov rax,cr9", UD, 0, .byte 0x44, 0x0f, 0x20, 0xc8
    FAULT "ud: mov rax,dr8", UD, 0, .byte 0x44, 0x0f, 0x21, 0xc0
    // Not advertised: VMX and SMX.
    mov eax, 1
    cpuid
    bt ecx, 5
    jc 1f
    FAULT "ud: vmxoff", UD, 0, .byte 0x0f, 0x01, 0xc4
    FAULT "ud: vmlaunch", UD, 0, .byte 0x0f, 0x01, 0xc2
    FAULT "ud: vmread", UD, 0, .byte 0x0f, 0x78, 0xc0
    jmp 2f
1:  SKIP "ud: vmxoff", "VMX is advertised"
    SKIP "ud: vmlaunch", "VMX is advertised"
    SKIP "ud: vmread", "VMX is advertised"
2:  mov eax, 1
    cpuid
    bt ecx, 6
    jc 1f
    FAULT "ud: getsec", UD, 0, .byte 0x0f, 0x37
    jmp 2f
1:  SKIP "ud: getsec", "SMX is advertised"
2:  // EVEX (AVX-512) without OSXSAVE set, or not advertised at all: #UD.
    FAULT "ud: evex vaddps zmm", UD, 0, .byte 0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc0
    // VEX with CR4.OSXSAVE clear: #UD (vol. 2, 2.4.3, table 2-20 "AVX state not enabled").
    FAULT "ud: vex vaddps, osxsave clear", UD, 0, .byte 0xc5, 0xfc, 0x58, 0xc0
    FAULT "ud: xgetbv, osxsave clear", UD, 0, .byte 0x0f, 0x01, 0xd0
    FAULT "ud: xsave, osxsave clear", UD, 0, .byte 0x0f, 0xae, 0x24, 0x25, 0, 0, 0x30, 0
    // SSE with CR4.OSFXSR clear: #UD (vol. 3, 2.5).
    mov rax, cr4
    and rax, ~CR4_OSFXSR
    mov cr4, rax
    FAULT "ud: addps, osfxsr clear", UD, 0, addps xmm0, xmm1
    mov rax, cr4
    or rax, CR4_OSFXSR
    mov cr4, rax
    // More than 15 bytes: #GP(0) (vol. 3, 6.15 interrupt 13).
    FAULT "gp: 16-byte instruction", GP, 0, .byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90
    FINE "15-byte instruction", .byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90

    // Compatibility mode: INTO and BOUND (vol. 2).
    ARM into_back
    push KCS32
    push offset into32
    retfq
into_back:
    CHECK_EXC "of: into in compatibility mode", OF, 0, into32_next
    CHECK "of: cs", "qword ptr [exc_cs]", KCS32
    ARM bound_back
    push KCS32
    push offset bound32
    retfq
bound_back:
    CHECK_EXC "br: bound in compatibility mode", BR, 0, bound32_at
    ARM bound2_back
    push KCS32
    push offset bound32_fine
    retfq
bound2_back:
    CHECK_EXC "br: bound within limits, then ud2", UD, 0, bound32_ud
    ARM boundr_back
    push KCS32
    push offset bound32_reg
    retfq
boundr_back:
    CHECK_EXC "ud: bound with a register operand", UD, 0, bound32_reg
    ARM intof_back
    push KCS32
    push offset into32_clear
    retfq
intof_back:
    CHECK_EXC "of: into with OF clear does nothing", UD, 0, into32_ud

    // #DF: #NP while delivering #UD gives #NP; a contributory fault while delivering a
    // contributory one gives #DF(0) (vol. 3, table 6-5). #GP whose gate is not present: the
    // delivery raises #NP (contributory) -> #DF.
    mov byte ptr [idt + GP * 16 + 5], 0x0e
    mov ax, 0x1f8
    ARM 1f
    mov ds, ax
1:  CHECK_EXC "df: gate of #GP not present", DF, 0
    mov byte ptr [idt + GP * 16 + 5], 0x8e
    // A benign exception first: the second is delivered as it is. Error code: IDT index, IDT bit,
    // and EXT set because the event was not INT n.
    mov byte ptr [idt + UD * 16 + 5], 0x0e
    FAULT "np: gate of #UD not present", NP, 6*8+2+1, ud2
    mov byte ptr [idt + UD * 16 + 5], 0x8e
    // INT n through the same: EXT clear.
    mov byte ptr [idt + 0x90 * 16 + 5], 0x0e
    FAULT "np: int 0x90, gate not present", NP, 0x90*8+2, int 0x90
    mov byte ptr [idt + 0x90 * 16 + 5], 0x8e
    // Not a gate at all: #GP.
    mov byte ptr [idt + 0x90 * 16 + 5], 0x82
    FAULT "gp: int 0x90, not a gate", GP, 0x90*8+2, int 0x90
    mov byte ptr [idt + 0x90 * 16 + 5], 0x8e
    // Target selector null, not code, not 64-bit.
    mov word ptr [idt + 0x90 * 16 + 2], 0
    FAULT "gp: gate with null selector", GP, 0, int 0x90
    mov word ptr [idt + 0x90 * 16 + 2], KDS
    FAULT "gp: gate with data selector", GP, KDS, int 0x90
    mov word ptr [idt + 0x90 * 16 + 2], KCS32
    FAULT "gp: gate with 32-bit code selector", GP, KCS32, int 0x90
    mov word ptr [idt + 0x90 * 16 + 2], 0x1f0
    FAULT "gp: gate with empty descriptor", GP, 0x1f0, int 0x90
    mov word ptr [idt + 0x90 * 16 + 2], 0x1000
    FAULT "gp: gate selector beyond the GDT", GP, 0x1000, int 0x90
    mov word ptr [idt + 0x90 * 16 + 2], KCS
    // Beyond the IDT limit.
    lidt [short_idt]
    FAULT "gp: int beyond the IDT limit", GP, 0x90*8+2, int 0x90
    lidt [idt_ptr]
    // Page fault while delivering a page fault: #DF; on page fault then contributory: #DF.
    mov rsi, 0x4000000000               // nothing mapped there
    ARM 1f
    mov rbx, rsp
    mov rsp, rsi
    mov eax, [rsi]                      // #PF, its frame cannot be pushed: #PF -> #DF
1:  CHECK_EXC "df: #PF, stack not mapped", DF, 0
    ret

    .code32
into32:
    mov al, 0x7f
    add al, 1
    into
into32_next:
    nop
into32_clear:
    xor eax, eax
    into
into32_ud:
    ud2
bound32:
    mov eax, 7
bound32_at:
    bound eax, [bounds]
    ud2
bound32_fine:
    mov eax, 5
    bound eax, [bounds]
    mov eax, -5
    bound eax, [bounds]
bound32_ud:
    ud2
bound32_reg:
    .byte 0x62, 0xc0
    ud2
    .code64
    .data
    .align 8
scratch: .quad 0
bounds: .long -5, 5
short_idt:
    .word 0x90 * 16 - 1
    .quad idt
