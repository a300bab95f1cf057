// Runtime of the test guests: entry by Multiboot 1 or PVH, page tables, long mode, descriptor
// tables, recording of exceptions, serial output, and the end by the debug-exit port.
#include "berth.inc"

    .section .multiboot, "ax"
    .align 4
mb_header:
    .long 0x1badb002, 0x00010000, -(0x1badb002 + 0x00010000)
    .long mb_header, __load_start, __load_end, __bss_end, start32

    .section .note.pvh, "a", @note
    .align 4
    .long 4, 8, 18                      // XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad start32

    .text
    .code32
    .globl start32
start32:
    cli
    cld
    mov edi, offset __bss_start
    mov ecx, offset __bss_end
    sub ecx, edi
    shr ecx, 2
    xor eax, eax
    rep stosd
    mov esp, offset stack_top
    lgdt [gdt_ptr]
    jmp KCS32:1f
1:  mov ax, KDS
    mov ds, ax
    mov es, ax
    mov ss, ax
    xor eax, eax
    mov fs, ax
    mov gs, ax
    mov al, 0xff                        // no interrupts from the 8259 pair
    out 0x21, al
    out 0xa1, al
    .weak main32
    mov eax, offset main32
    test eax, eax
    jz 1f
    jmp eax

1:  // 0..8 MiB in 4 KiB pages, the rest of 4 GiB in 2 MiB pages.
    mov edi, offset pt0
    mov eax, 0x003
    mov ecx, 4 * 512
2:  mov edx, eax
    cmp eax, offset __user_start
    jb 3f
    cmp eax, offset __user_end
    jae 3f
    or edx, 4
3:  mov [edi], edx
    add edi, 8
    add eax, 4096
    loop 2b
    mov dword ptr [pt0 + 0x7ff * 8], 0xfee0001b     // APIC, see berth.inc
    mov dword ptr [pt0 + 0x7fe * 8], 0xfec0001b     // IOAPIC
    mov edi, offset pd0
    mov eax, 0x083
    mov ecx, 4 * 512
2:  mov [edi], eax
    add edi, 8
    add eax, 0x200000
    loop 2b
    mov eax, offset pt0 + 7
    mov edi, offset pd0
    mov ecx, 4
2:  mov [edi], eax
    add edi, 8
    add eax, 4096
    loop 2b
    mov eax, offset pd0 + 7
    mov edi, offset pdpt
    mov ecx, 4
2:  mov [edi], eax
    add edi, 8
    add eax, 4096
    loop 2b
    mov dword ptr [pml4], offset pdpt + 7
    // long_enter: also the way of application processors; ESP is set.
    .globl long_enter
long_enter:
    mov eax, CR4_PAE | CR4_PGE | CR4_OSFXSR | CR4_OSXMMEXCPT
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, MSR_EFER
    mov eax, 0x901                      // NXE, LME, SCE
    xor edx, edx
    wrmsr
    mov eax, CR0_PG | CR0_WP | CR0_NE | 0x10 | CR0_MP | CR0_PE
    mov cr0, eax
    jmp KCS:long_start

    .code64
long_start:
    mov ax, KDS
    mov ds, ax
    mov es, ax
    mov ss, ax
    .weak ap_main
    cmp byte ptr [bsp_up], 0
    je 1f
    mov rax, offset ap_main
    jmp rax
1:  mov byte ptr [bsp_up], 1
    // TSS: RSP0, IST1 (#DF), IST2 (NMI), IST3 (on demand).
    mov qword ptr [tss + 4], offset rsp0_top
    mov qword ptr [tss + 36], offset ist1_top
    mov qword ptr [tss + 44], offset ist2_top
    mov qword ptr [tss + 52], offset ist3_top
    mov word ptr [tss + 102], 104       // no I/O bitmap: its base is beyond the limit
    mov rax, offset tss
    mov ecx, 0x89
    mov edx, 103
    mov rdi, offset gdt + TSS_SEL
    call make_system_descriptor
    mov ax, TSS_SEL
    ltr ax
    xor eax, eax
    lldt ax
    // IDT: interrupt gates; DPL 3 for #BP, #OF and 0x80..0x8f.
    mov rdi, offset idt
    mov rax, offset stubs
    xor ecx, ecx
1:  mov [rdi], ax
    mov word ptr [rdi + 2], KCS
    mov word ptr [rdi + 4], 0x8e00
    mov rdx, rax
    shr rdx, 16
    mov [rdi + 6], dx
    mov dword ptr [rdi + 8], 0
    mov dword ptr [rdi + 12], 0
    add rdi, 16
    add rax, 16
    inc ecx
    cmp ecx, 256
    jb 1b
    mov byte ptr [idt + BP * 16 + 5], 0xee
    mov byte ptr [idt + OF * 16 + 5], 0xee
    mov ecx, 0x80
1:  mov edx, ecx
    shl edx, 4
    mov byte ptr [idt + rdx + 5], 0xee
    inc ecx
    cmp ecx, 0x90
    jb 1b
    mov byte ptr [idt + DF * 16 + 4], 1
    mov byte ptr [idt + NMI * 16 + 4], 2
    lidt [idt_ptr]
    fninit
    call main
    // falls into done

    // done: prints the counts and ends with the number of failures.
    .globl done
done:
    mov rsi, offset msg_done
    call puts
    mov rax, [checks_ok]
    call putdec
    mov rsi, offset msg_ok
    call puts
    mov rax, [checks_failed]
    call putdec
    mov rsi, offset msg_failed
    call puts
    mov eax, [checks_failed]
    cmp eax, 100
    jbe 1f
    mov eax, 100
1:  mov dx, 0xf4
    out dx, eax
2:  cli
    hlt
    jmp 2b

    // make_system_descriptor: RDI slot, RAX base, ECX access byte, EDX limit (byte granular).
    .globl make_system_descriptor
make_system_descriptor:
    push rax
    push rdx
    mov [rdi], dx
    mov [rdi + 2], ax
    shr rax, 16
    mov [rdi + 4], al
    mov [rdi + 5], cl
    shr edx, 16
    mov [rdi + 6], dl
    mov [rdi + 7], ah
    shr rax, 16
    mov [rdi + 8], eax
    mov dword ptr [rdi + 12], 0
    pop rdx
    pop rax
    ret

    // set_ist: EDI vector, ESI IST index (0 none).
    .globl set_ist
set_ist:
    shl edi, 4
    mov [idt + rdi + 4], sil
    shr edi, 4
    ret

    // call_user: RDI entry point at CPL 3; other registers are handed over. Comes back at the
    // first exception or INT 0x80..0x8f, which is recorded; RAX..R11 are then the program's.
    .globl call_user
call_user:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    ARM 1f
    push [user_ss]
    push [user_rsp]
    push [user_flags]
    push [user_cs]
    push rdi
    iretq
1:  mov qword ptr [fixup], 0
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

    .altmacro
    .macro STUB v
    .align 16
    .if (\v == 8) || ((\v >= 10) && (\v <= 14)) || (\v == 17) || (\v == 21)
    .else
    push 0
    .endif
    push \v
    jmp exc_common
    .endm
    .align 16
    .globl stubs
stubs:
    .set v, 0
    .rept 256
    STUB %v
    .set v, v + 1
    .endr
    .noaltmacro

exc_common:
    push rax
    push rcx
    push rdx
    push rbx
    push rbp
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    cld
    mov rdi, rsp
    mov rax, [rdi + F_VEC]
    movzx eax, al
    mov rcx, [hooks + rax * 8]
    test rcx, rcx
    jz 1f
    mov rbp, rsp
    and rsp, -16
    call rcx
    mov rsp, rbp
    jmp 9f
1:  inc qword ptr [exc_count]
    mov [exc_vec], rax
    mov rcx, [rdi + F_ERR]
    mov [exc_err], rcx
    mov rcx, [rdi + F_RIP]
    mov [exc_rip], rcx
    mov rcx, [rdi + F_CS]
    mov [exc_cs], rcx
    mov rcx, [rdi + F_RFLAGS]
    mov [exc_rflags], rcx
    mov rcx, [rdi + F_RSP]
    mov [exc_rsp], rcx
    mov rcx, [rdi + F_SS]
    mov [exc_ss], rcx
    mov [exc_frame], rdi
    cmp eax, PF
    jne 2f
    mov rcx, cr2
    mov [exc_cr2], rcx
2:  cmp eax, DB
    jne 2f
    mov rcx, dr6
    mov [exc_dr6], rcx
    mov ecx, 0xffff0ff0
    mov dr6, rcx
2:  mov rcx, [fixup]
    test rcx, rcx
    jz unexpected
    mov qword ptr [fixup], 0
    mov [rdi + F_RIP], rcx
    mov qword ptr [rdi + F_CS], KCS
    mov qword ptr [rdi + F_RFLAGS], 2
    mov rcx, [fixup_rsp]
    mov [rdi + F_RSP], rcx
    mov qword ptr [rdi + F_SS], KDS
9:  pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdi
    pop rsi
    pop rbp
    pop rbx
    pop rdx
    pop rcx
    pop rax
    add rsp, 16
    iretq

unexpected:
    mov rsi, offset msg_unexpected
    call puts
    mov rax, [exc_vec]
    call puthex
    mov rsi, offset msg_err
    call puts
    mov rax, [exc_err]
    call puthex
    mov rsi, offset msg_rip
    call puts
    mov rax, [exc_rip]
    call puthex
    mov rsi, offset msg_cr2
    call puts
    mov rax, cr2
    call puthex
    mov rsi, offset msg_nl
    call puts
    inc qword ptr [checks_failed]
    mov rsp, offset stack_top
    jmp done

    .macro SAVE
    pushfq
    cld
    push rax
    push rcx
    push rdx
    push rsi
    push rdi
    push rbx
    .endm
    .macro RESTORE
    pop rbx
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    pop rax
    popfq
    .endm

    // check_eq: [rsp+8] name, want, got; pops them.
    .globl check_eq
check_eq:
    SAVE
    mov rdi, [rsp + 64]
    mov rdx, [rsp + 72]
    mov rbx, [rsp + 80]
    cmp rdx, rbx
    jne 1f
    call ok
    jmp 2f
1:  call fail
    mov rsi, offset msg_got
    call got_want
2:  RESTORE
    ret 24

    // check_exc: name, rip, err, vec; pops them.
    .globl check_exc
check_exc:
    SAVE
    mov rdi, [rsp + 64]
    mov rbx, [exc_vec]
    mov rdx, [rsp + 88]
    mov rsi, offset msg_got_vec
    cmp rbx, rdx
    jne 1f
    mov rbx, [exc_err]
    mov rdx, [rsp + 80]
    mov rsi, offset msg_got_err
    cmp rbx, rdx
    jne 1f
    mov rbx, [exc_rip]
    mov rdx, [rsp + 72]
    mov rsi, offset msg_got_rip
    test rdx, rdx
    jz 3f
    cmp rbx, rdx
    jne 1f
3:  call ok
    jmp 2f
1:  push rsi
    call fail
    pop rsi
    call got_want
2:  RESTORE
    ret 32

    .globl check_skip
check_skip:
    SAVE
    mov rsi, offset msg_skip
    call puts
    mov rsi, [rsp + 64]
    call puts
    mov rsi, offset msg_nl
    call puts
    RESTORE
    ret 8

ok: inc qword ptr [checks_ok]
    mov rsi, offset msg_okline
    call puts
    mov rsi, rdi
    call puts
    mov rsi, offset msg_nl
    jmp puts

fail:                                   // RDI name; keeps RDX
    inc qword ptr [checks_failed]
    push rdx
    mov rsi, offset msg_failline
    call puts
    mov rsi, rdi
    call puts
    pop rdx
    ret

got_want:                               // RSI text, RBX got, RDX want
    push rdx
    call puts
    mov rax, rbx
    call puthex
    mov rsi, offset msg_want
    call puts
    pop rax
    call puthex
    mov rsi, offset msg_nl
    // falls into puts

    // puts: RSI text; clobbers RAX, RDX, RSI.
    .globl puts
puts:
    mov dx, 0x3fd
1:  in al, dx
    test al, 0x20
    jz 1b
    lodsb
    test al, al
    jz 2f
    mov dx, 0x3f8
    out dx, al
    jmp puts
2:  ret

    // puthex: RAX; clobbers RAX, RCX, RDX, RSI.
    .globl puthex
puthex:
    mov rsi, offset numbuf + 17
    mov ecx, 16
1:  dec rsi
    mov dl, al
    and dl, 15
    add dl, '0'
    cmp dl, '9'
    jbe 2f
    add dl, 'a' - '9' - 1
2:  mov [rsi], dl
    shr rax, 4
    jz 3f
    loop 1b
3:  jmp puts

putdec:
    mov rsi, offset numbuf + 17
    mov ecx, 10
1:  dec rsi
    xor edx, edx
    div rcx
    add dl, '0'
    mov [rsi], dl
    test rax, rax
    jnz 1b
    jmp puts

    .section .rodata
msg_okline: .asciz "ok "
msg_failline: .asciz "FAIL "
msg_skip: .asciz "skip "
msg_nl: .asciz "\n"
msg_got: .asciz ": got "
msg_got_vec: .asciz ": vector got "
msg_got_err: .asciz ": error code got "
msg_got_rip: .asciz ": rip got "
msg_want: .asciz " want "
msg_unexpected: .asciz "FAIL unexpected exception: vector "
msg_err: .asciz " error code "
msg_rip: .asciz " rip "
msg_cr2: .asciz " cr2 "
msg_done: .asciz "done: "
msg_ok: .asciz " ok, "
msg_failed: .asciz " failed\n"

    .data
numbuf: .skip 18
    .align 16
    .globl gdt, gdt_ptr, idt_ptr
gdt:
    .quad 0
    .quad 0x00af9b000000ffff            // KCS    64-bit code, DPL 0
    .quad 0x00cf93000000ffff            // KDS    data, DPL 0
    .quad 0x00cffb000000ffff            // UCS32  32-bit code, DPL 3
    .quad 0x00cff3000000ffff            // UDS    data, DPL 3
    .quad 0x00affb000000ffff            // UCS64  64-bit code, DPL 3
    .quad 0x00cf9b000000ffff            // KCS32  32-bit code, DPL 0
    .quad 0x00009b000000ffff            // KCS16  16-bit code, base 0, 64 KiB
    .quad 0x000093000000ffff            // KDS16  16-bit data, base 0, 64 KiB
    .skip gdt + GDT_END - .
gdt_ptr:
    .word GDT_END - 1
    .quad gdt
idt_ptr:
    .word 256 * 16 - 1
    .quad idt
    .align 8
    .globl user_ss, user_cs, user_flags, user_rsp
user_ss: .quad UDS
user_cs: .quad UCS64
user_flags: .quad 2
user_rsp: .quad user_stack_top

    .section .user, "awx", @progbits
    .align 16
    .skip 2048
    .globl user_stack_top
user_stack_top:
    .skip 16
    // user_done: returns to the kernel; a convenient return address for programs at CPL 3.
    .globl user_done
user_done:
    int 0x80

    .bss
    .globl fixup, fixup_rsp, exc_vec, exc_err, exc_rip, exc_cs, exc_rflags, exc_rsp, exc_ss
    .globl exc_cr2, exc_dr6, exc_count, exc_frame, hooks, checks_ok, checks_failed
    .align 64
fixup: .skip 8
fixup_rsp: .skip 8
exc_vec: .skip 8
exc_err: .skip 8
exc_rip: .skip 8
exc_cs: .skip 8
exc_rflags: .skip 8
exc_rsp: .skip 8
exc_ss: .skip 8
exc_cr2: .skip 8
exc_dr6: .skip 8
exc_count: .skip 8
exc_frame: .skip 8
checks_ok: .skip 8
checks_failed: .skip 8
    .globl bsp_up
bsp_up: .skip 8
hooks: .skip 256 * 8
    .globl tss
    .align 128
tss: .skip 104
    .globl io_bitmap
io_bitmap: .skip 8193                   // stays inside the TSS for guests that extend its limit
    .align 4096
    .globl idt, pml4, pdpt, pd0, pt0, stack_top, rsp0_top, ist1_top, ist2_top, ist3_top
idt: .skip 4096
pml4: .skip 4096
pdpt: .skip 4096
pd0: .skip 4 * 4096
pt0: .skip 4 * 4096
    .skip 16384
stack_top:
    .skip 8192
rsp0_top:
    .skip 4096
ist1_top:
    .skip 4096
ist2_top:
    .skip 4096
ist3_top:
