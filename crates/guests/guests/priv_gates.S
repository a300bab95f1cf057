// Stack switches by TSS.RSP0 and IST, call gates, far CALL/RET/JMP between levels, IRET in its forms,
// LAR, LSL, VERR, VERW. Intel SDM vol. 3, 5.8, 6.14; vol. 2, CALL, RET, IRET, LAR, LSL, VERR.
#include "berth.inc"
    .text
    .globl main
#define GATE3   0x68    /* call gate, DPL 3, to KCS */
#define GATE0   0x78    /* call gate, DPL 0 */
#define GATENP  0x88    /* call gate, not present */
#define GATE32  0x98    /* call gate to a 32-bit segment */
#define CONF    0xa8    /* conforming 64-bit code, DPL 0 */
#define SMALL   0xb0    /* data, limit 0x1234 bytes, DPL 3 */
#define XONLY3  0xb8    /* execute-only code, DPL 3 */
#define RO3     0xc0    /* read-only data, DPL 3 */
#define DOWN    0xc8    /* expand-down data, DPL 0 */
    .macro GATE sel, target_sel, access
    mov rax, offset gate_target
    mov rdi, offset gdt + \sel
    mov [rdi], ax
    mov word ptr [rdi + 2], \target_sel
    mov word ptr [rdi + 4], \access << 8
    shr rax, 16
    mov [rdi + 6], ax
    mov dword ptr [rdi + 8], 0
    mov dword ptr [rdi + 12], 0
    .endm
main:
    GATE GATE3, KCS, 0xec
    GATE GATE0, KCS, 0x8c
    GATE GATENP, KCS, 0x6c
    GATE GATE32, KCS32, 0xec
    mov rax, 0x00af9f000000ffff
    mov [gdt + CONF], rax
    mov rax, 0x0040f30000001234
    mov [gdt + SMALL], rax
    mov rax, 0x00aff9000000ffff
    mov [gdt + XONLY3], rax
    mov rax, 0x00cff1000000ffff
    mov [gdt + RO3], rax
    mov rax, 0x00cf97000000ffff
    mov [gdt + DOWN], rax

    // RSP0: the frame is at its top, aligned; SS is null with RPL 0 (6.14.4).
    USER "ud2 at CPL 3", u_ud2, UD, 0, u_ud2
    mov rax, [exc_frame]
    add rax, 22 * 8
    CHECK "frame begins at RSP0", rax, "offset rsp0_top"
    CHECK "saved ss", "qword ptr [exc_ss]", UDS
    CHECK "saved cs", "qword ptr [exc_cs]", UCS64
    CHECK "saved rsp", "qword ptr [exc_rsp]", "offset user_stack_top"
    mov qword ptr [tss + 4], offset rsp0_top - 8
    USER "ud2 at CPL 3, RSP0 not aligned", u_ud2, UD, 0, u_ud2
    mov rax, [exc_frame]
    add rax, 22 * 8
    CHECK "frame is aligned down", rax, "offset rsp0_top - 16"
    mov qword ptr [tss + 4], offset rsp0_top
    mov qword ptr [hooks + 0x84 * 8], offset on_84
    mov rdi, offset u_int84
    call call_user
    CHECK "ss in the handler is null", "qword ptr [seen_ss]", 0
    CHECK "cs in the handler", "qword ptr [seen_cs]", KCS
    // RPL of the gate's selector does not matter.
    mov word ptr [idt + 0x84 * 16 + 2], KCS | 3
    USER "gate selector with RPL 3", u_int84, NONE
    CHECK "cs in the handler has RPL 0", "qword ptr [seen_cs]", KCS
    mov word ptr [idt + 0x84 * 16 + 2], KCS
    // From CPL 0 SS stays.
    int 0x84
    CHECK "same level: ss kept", "qword ptr [seen_ss]", KDS
    // IST: switches even at CPL 0; SS becomes null only when the level changes.
    mov edi, UD
    mov esi, 3
    call set_ist
    FAULT "ist: ud2 at CPL 0", UD, 0, ud2
    mov rax, [exc_frame]
    add rax, 22 * 8
    CHECK "ist: frame begins at IST3", rax, "offset ist3_top"
    USER "ist: ud2 at CPL 3", u_ud2, UD, 0, u_ud2
    mov rax, [exc_frame]
    add rax, 22 * 8
    CHECK "ist: from CPL 3 as well", rax, "offset ist3_top"
    mov edi, UD
    xor esi, esi
    call set_ist
    // Without IST the frame lies below the old RSP, aligned to 16.
    mov rbx, rsp
    and rsp, -16
    sub rsp, 8
    mov rdx, rsp
    FAULT "no ist: ud2", UD, 0, ud2
    mov rsp, rbx
    mov rax, [exc_frame]
    add rax, 22 * 8
    add rax, 8
    CHECK "no ist: frame below rsp, aligned", rax, rdx
    CHECK "no ist: saved rsp is the old one", "qword ptr [exc_rsp]", rdx

    // Call gates.
    USER "call gate from CPL 3: comes to its target", u_gate, 0x82
    CHECK "call gate: pushed ss", "qword ptr [gate_frame + 24]", UDS
    CHECK "call gate: pushed rsp", "qword ptr [gate_frame + 16]", "offset user_stack_top"
    CHECK "call gate: pushed cs", "qword ptr [gate_frame + 8]", UCS64
    CHECK "call gate: pushed rip", "qword ptr [gate_frame]", "offset u_gate_next"
    CHECK "call gate: rsp is RSP0 - 32", "qword ptr [gate_rsp]", "offset rsp0_top - 32"
    CHECK "call gate: cs", "qword ptr [seen_cs]", KCS
    CHECK "call gate: ss is null", "qword ptr [seen_ss]", 0
    USER "call gate: retf comes back to CPL 3", u_gate_ret, NONE
    CHECK "call gate: back on its stack", "qword ptr [exc_rsp]", "offset user_stack_top"
    USER "call gate of DPL 0 from CPL 3", u_gate0, GP, GATE0, u_gate0
    USER "call gate not present", u_gatenp, NP, GATENP, u_gatenp
    USER "call gate to a 32-bit segment", u_gate32, GP, KCS32, u_gate32
    USER "jmp through a gate to an inner level", u_gatejmp, GP, KCS, u_gatejmp
    USER "far call to an inner segment", u_callk, GP, KCS, u_callk
    USER "far jmp to a conforming segment", u_conf, NONE
    CHECK "conforming: CPL stays 3", "qword ptr [exc_cs]", CONF | 3
    mov rdi, rsp
    call fword ptr [k_gate]             // from CPL 0: no stack switch
k_gate_next:
    CHECK "call gate at CPL 0: pushed rip", "qword ptr [gate_frame]", "offset k_gate_next"
    sub rdi, 16
    CHECK "call gate at CPL 0: same stack", "qword ptr [gate_rsp]", rdi

    // RETF to an outer level, with parameters.
    ARM 1f
    push UDS
    push offset user_stack_top - 64
    push 0xdead
    push UCS64
    push offset user_done
    .byte 0x48
    .byte 0xca, 8, 0
1:  CHECK_EXC "retf imm to CPL 3", NONE, 0
    CHECK "retf imm: rsp released on both stacks", "qword ptr [exc_rsp]", "offset user_stack_top - 56"
    USER "retf to an inner level", u_retf_in, GP, KCS, u_retf_in1

    // IRET.
    .macro IRETQ_TO ss, rsp, flags, cs, rip
    push \ss
    push \rsp
    push \flags
    push \cs
    push \rip
    .endm
    mov rbx, rsp
    IRETQ_TO KDS, rbx, 2, KCS, "offset 1f"
    iretq
1:  mov rax, rsp
    CHECK "iretq same level pops ss:rsp", rax, rbx
    // SS null is fine for a return to 64-bit CPL 0.
    IRETQ_TO 0, rbx, 2, KCS, "offset 1f"
    iretq
1:  mov eax, ss
    CHECK "iretq to CPL 0 with null ss", rax, 0
    mov eax, KDS
    mov ss, eax
    // Back to 32-bit and 16-bit compatibility code at CPL 3.
    mov r8, offset u32_done
    mov qword ptr [user_cs], UCS32
    USER "iretq to compatibility mode", u32_done, NONE, 0, u32_next
    CHECK "iretq to compatibility mode: cs", "qword ptr [exc_cs]", UCS32
    mov qword ptr [user_cs], UCS64
    // IRETD (32-bit operand size) within 64-bit mode pops dwords.
    sub rsp, 20
    mov dword ptr [rsp], offset 1f
    mov dword ptr [rsp + 4], KCS
    mov dword ptr [rsp + 8], 0x46
    mov dword ptr [rsp + 12], ebx
    mov dword ptr [rsp + 16], KDS
    iretd
1:  pushfq
    pop rdx
    mov rax, rsp
    CHECK "iretd: rsp", rax, rbx
    CHECK "iretd: flags", rdx, 0x46
    // Faults of IRET: at the IRET, frame not consumed.
    .macro IRET_FAULT name, vec, err, ss, rsp, flags, cs, rip
    IRETQ_TO \ss, \rsp, \flags, \cs, "\rip"
    mov rdx, rsp
    FAULT "\name", \vec, \err, iretq
    mov rax, [exc_rsp]
    CHECK "\name: rsp", rax, rdx
    mov rsp, rbx
    .endm
    IRET_FAULT "iretq, cs null", GP, 0, KDS, rbx, 2, 0, "offset user_done"
    IRET_FAULT "iretq, cs is data", GP, KDS, KDS, rbx, 2, KDS, "offset user_done"
    IRET_FAULT "iretq, cs empty", GP, 0x1f0, KDS, rbx, 2, 0x1f0, "offset user_done"
    IRET_FAULT "iretq, cs beyond the GDT", GP, 0x7000, KDS, rbx, 2, 0x7000, "offset user_done"
    IRET_FAULT "iretq, cs DPL 3 with RPL 0", GP, 0x28, KDS, rbx, 2, 0x28, "offset user_done"
    IRET_FAULT "iretq, cs DPL 0 with RPL 3", GP, KCS, UDS, rbx, 2, KCS|3, "offset user_done"
    IRET_FAULT "iretq to CPL 3, ss null", GP, 0, 3, rbx, 2, UCS64, "offset user_done"
    IRET_FAULT "iretq to CPL 3, ss of DPL 0", GP, KDS, KDS, rbx, 2, UCS64, "offset user_done"
    IRET_FAULT "iretq to CPL 3, ss is code", GP, 0x28, UCS64, rbx, 2, UCS64, "offset user_done"
    IRET_FAULT "iretq to CPL 3, ss read-only", GP, RO3, RO3|3, rbx, 2, UCS64, "offset user_done"
    btr qword ptr [gdt + SMALL], 47     // not present now
    IRET_FAULT "iretq to CPL 3, ss not present", SS_, SMALL, SMALL|3, rbx, 2, UCS64, "offset user_done"
    bts qword ptr [gdt + SMALL], 47
    btr qword ptr [gdt + XONLY3], 47
    IRET_FAULT "iretq to CPL 3, cs not present", NP, XONLY3, UDS, rbx, 2, XONLY3|3, "offset user_done"
    bts qword ptr [gdt + XONLY3], 47
    mov r9, 0x0000800000000000
    IRET_FAULT "iretq, rip non-canonical", GP, 0, KDS, rbx, 2, KCS, r9
    IRET_FAULT "iretq to CPL 3, rip non-canonical", GP, 0, UDS, rbx, 2, UCS64, r9
    // NT set: no task return in 64-bit mode, #GP(0).
    push 0x4002
    popfq
    FAULT "iretq with NT set", GP, 0, iretq
    push 2
    popfq
    // Segments of DPL below the new CPL are cleared on the way out (vol. 2, IRET).
    mov ax, KDS
    mov ds, ax
    mov es, ax
    mov ax, UDS
    mov fs, ax
    USER "iretq to CPL 3: reads its segment registers", u_segs, NONE
    CHECK "iretq to CPL 3 clears ds of DPL 0", rax, 0
    CHECK "iretq to CPL 3 keeps fs of DPL 3", rcx, UDS

    // LAR, LSL, VERR, VERW.
    .macro LXX name, insn, sel, zf, value
    mov ecx, \sel
    mov eax, -1
    xor edx, edx
    \insn eax, ecx
    setz dl
    mov r12, rax
    and r12d, 0xfff0ffff                // bits 19:16 of LAR's result are undefined
    CHECK "\name: zf", rdx, \zf
    mov edx, \value
    CHECK "\name: value", r12, rdx
    .endm
    LXX "lar of KCS", lar, KCS, 1, 0x00a09b00
    LXX "lar of UDS", lar, UDS, 1, 0x00c0f300
    LXX "lar of the TSS", lar, TSS_SEL, 1, 0x00008b00
    LXX "lar of a call gate", lar, GATE3, 1, 0x0010ec00
    LXX "lar null", lar, 0, 0, 0xfff0ffff
    LXX "lar beyond", lar, 0x7000, 0, 0xfff0ffff
    LXX "lar empty", lar, 0x1f0, 0, 0xfff0ffff
    LXX "lsl of KDS", lsl, KDS, 1, 0xfff0ffff
    LXX "lsl byte granular", lsl, SMALL, 1, 0x1234
    LXX "lsl of a call gate", lsl, GATE3, 0, 0xfff0ffff
    LXX "lsl of the TSS", lsl, TSS_SEL, 1, 103
    .macro VER name, insn, sel, zf
    mov ecx, \sel
    xor edx, edx
    \insn cx
    setz dl
    CHECK "\name", rdx, \zf
    .endm
    VER "verr KDS", verr, KDS, 1
    VER "verr KDS with RPL 3", verr, KDS|3, 0
    VER "verr of readable code", verr, KCS, 1
    VER "verr of conforming code with RPL 3", verr, CONF|3, 1
    VER "verr of execute-only code", verr, XONLY3, 0
    VER "verr null", verr, 0, 0
    VER "verr of a TSS", verr, TSS_SEL, 0
    VER "verw KDS", verw, KDS, 1
    VER "verw code", verw, KCS, 0
    VER "verw read-only", verw, RO3, 0
    USER_SECTION
u_ver: mov ecx, KDS
    xor eax, eax
    verr cx
    setz al
    xor edx, edx
    mov ecx, UDS
    verw cx
    setz dl
    mov ecx, KDS
    lar r8d, ecx
    setz r9b
    movzx r9d, r9b
    int 0x80
    END_SECTION
    mov rdi, offset u_ver
    call call_user
    CHECK "cpl 3: verr KDS", rax, 0
    CHECK "cpl 3: verw UDS", rdx, 1
    CHECK "cpl 3: lar KDS", r9, 0
    // SLDT, STR, SGDT, SIDT, SMSW.
    str eax
    CHECK "str r32 zero-extends", rax, TSS_SEL
    mov rax, -1
    str ax
    and eax, 0xffff
    CHECK "str r16", rax, TSS_SEL
    sgdt [scratch]
    movzx eax, word ptr [scratch]
    CHECK "sgdt: limit", rax, 0x1ff
    CHECK "sgdt: base", "qword ptr [scratch + 2]", "offset gdt"
    // An LDT: descriptors by TI = 1, its limit.
    mov rax, 0x00cf93000000ffff
    mov [ldt + 8], rax
    mov rdi, offset gdt + LDT_SEL
    mov rax, offset ldt
    mov ecx, 0x82
    mov edx, 15
    call make_system_descriptor
    mov ax, LDT_SEL
    lldt ax
    mov ax, 0x0c
    FINE "mov es from the LDT", mov es, ax
    mov ax, 0x14
    FAULT "mov es beyond the LDT limit", GP, 0x14, mov es, ax
    mov ax, 0x04
    FAULT "mov es, LDT entry 0 is not null", GP, 0x04, mov es, ax
    sldt eax
    CHECK "sldt", rax, LDT_SEL
    ret

on_84:
    mov eax, ss
    mov [seen_ss], rax
    mov eax, cs
    mov [seen_cs], rax
    ret
gate_target:
    mov [gate_rsp], rsp
    mov rax, [rsp]
    mov [gate_frame], rax
    mov rax, [rsp + 8]
    mov [gate_frame + 8], rax
    mov rax, [rsp + 16]
    mov [gate_frame + 16], rax
    mov rax, [rsp + 24]
    mov [gate_frame + 24], rax
    mov eax, ss
    mov [seen_ss], rax
    mov eax, cs
    mov [seen_cs], rax
    retfq

    USER_SECTION
u_ud2: ud2
u_int84:
    int 0x84
    int 0x80
u_gate:
    call fword ptr [u_gate_ptr]
u_gate_next:
    int 0x82
u_gate_ret:
    call fword ptr [u_gate_ptr]
    int 0x80
u_gate0: call fword ptr [u_gate0_ptr]
u_gatenp: call fword ptr [u_gatenp_ptr]
u_gate32: call fword ptr [u_gate32_ptr]
u_gatejmp: jmp fword ptr [u_gate_ptr]
u_callk: call fword ptr [u_callk_ptr]
u_conf: jmp fword ptr [u_conf_ptr]
u_retf_in:
    push KCS
    push offset user_done
u_retf_in1:
    retfq
u_segs:
    mov eax, ds
    mov ecx, fs
    int 0x80
    .code32
u32_done:
    int 0x80
u32_next:
    nop
    .code64
u_gate_ptr: .long 0
    .word GATE3 | 3
u_gate0_ptr: .long 0
    .word GATE0 | 3
u_gatenp_ptr: .long 0
    .word GATENP | 3
u_gate32_ptr: .long 0
    .word GATE32 | 3
u_callk_ptr: .long 0
    .word KCS | 3
u_conf_ptr: .long user_done
    .word CONF | 3
    END_SECTION
    .data
k_gate: .long 0
    .word GATE0
    .align 8
ldt: .quad 0, 0
scratch: .quad 0, 0
    .bss
    .align 8
seen_ss: .skip 8
seen_cs: .skip 8
gate_rsp: .skip 8
gate_frame: .skip 32
