//! The guests.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use berth_vmm::boot::Module;
use berth_vmm::console::SerialConfig;
use berth_vmm::machine::{Machine, MachineConfig};
use berth_vmm::outcome::Outcome;

use crate::run::{Folder, Format, assemble, check, processors};

/// A Multiboot header, a stack, `print` (zero-ended text at ESI) and `putc` (AL) over COM1.
pub const MULTIBOOT: &str = r"
.section .text
.align 4
.long 0x1badb002, 3, -(0x1badb002 + 3)
.globl start
print:
    lodsb
    test al, al
    jz 1f
    call putc
    jmp print
1:  ret
putc:
    push eax
    mov dx, 0x3fd
1:  in al, dx
    test al, 0x20
    jz 1b
    pop eax
    mov dx, 0x3f8
    out dx, al
    ret
fail:
    mov al, 99
    out 0xf4, al
    hlt
start:
    mov esp, 0x90000
";

/// Puts an interrupt gate for vector CL to EAX into the table at 0x8000.
pub const GATES: &str = r"
.macro gate vector, handler
    lea eax, \handler
    mov word ptr [0x8000 + \vector * 8], ax
    mov word ptr [0x8000 + \vector * 8 + 2], 0x10
    mov word ptr [0x8000 + \vector * 8 + 4], 0x8e00
    shr eax, 16
    mov word ptr [0x8000 + \vector * 8 + 6], ax
.endm
# Returns from an interrupt with interrupts off (so that handlers do not nest), losing EAX, and
# without IRET: KVM without hardware virtualization has it only in real mode.
.macro finish
    pop eax
    add esp, 4
    xchg eax, [esp]
    and eax, 0xfffffdff
    push eax
    popfd
    ret
.endm
.macro load_table
    mov word ptr [0x7ff0], 0x7ff
    mov dword ptr [0x7ff2], 0x8000
    lidt [0x7ff0]
.endm
.macro init_pic
    mov al, 0x11; out 0x20, al; out 0xa0, al
    mov al, 0x20; out 0x21, al
    mov al, 0x28; out 0xa1, al
    mov al, 4; out 0x21, al
    mov al, 2; out 0xa1, al
    mov al, 1; out 0x21, al; out 0xa1, al
    mov al, \mask; out 0x21, al
    mov al, 0xff; out 0xa1, al
.endm
";

fn nothing(_: &mut MachineConfig) {}

fn gates(mask: &str) -> String {
    GATES.replace("\\mask", mask)
}

#[test]
fn multiboot_prints_its_command_line_and_module() {
    let folder = Folder::new();
    let module = folder.0.join("module");
    std::fs::write(&module, "a module\n\0").unwrap();
    let text = format!(
        "{MULTIBOOT}
        cmp eax, 0x2badb002
        jne fail
        mov esi, [ebx + 16]
        # Skip the name of the kernel.
    2:  lodsb
        cmp al, ' '
        jne 2b
        call print
        mov al, '\\n'
        call putc
        mov esi, [ebx + 24]
        mov esi, [esi]
        call print
        mov al, 3
        out 0xf4, al
        hlt"
    );
    let prepare = |config: &mut MachineConfig| {
        config.cmdline = "hello world".into();
        config.modules = vec![Module { path: module.clone(), args: String::new() }];
    };
    let wanted = (Outcome::DebugExit(3), "hello world\na module\n");
    check(&text, Format::Elf32, prepare, wanted);
}

#[test]
fn pvh_prints_its_command_line_and_powers_off() {
    let start = MULTIBOOT.split("print:").nth(1).unwrap();
    let text = format!(
        ".section .note.pvh, \"a\", @note
        .align 4
        .long 4, 4, 18
        .asciz \"Xen\"
        .long start
        .section .text
        .globl start
        print: {start}
        cmp dword ptr [ebx], 0x336ec578
        jne fail
        mov esi, [ebx + 24]
        call print
        # The RSDP that it names has its signature.
        mov esi, [ebx + 32]
        cmp dword ptr [esi], 0x20445352
        jne fail
        mov dx, 0x600
        mov al, 0x34
        out dx, al
        hlt"
    );
    let prepare = |config: &mut MachineConfig| config.cmdline = "pvh line\n".into();
    check(&text, Format::Elf32, prepare, (Outcome::PoweredOff, "pvh line\n"));
}

#[test]
fn bzimage_is_entered_in_64_bit_mode() {
    let text = "
    .org 0x1f1
    .byte 1
    .org 0x1f4
    .long 0x40
    .org 0x1fe
    .word 0xaa55
    .byte 0xeb, 0x6a
    .ascii \"HdrS\"
    .word 0x20f
    .org 0x211
    .byte 1
    .org 0x22c
    .long 0x7fffffff, 0x200000
    .byte 1, 21
    .word 1
    .long 2047
    .org 0x258
    .quad 0x1000000
    .long 0x100000
    .org 0x400 + 0x200
    mov esp, 0x90000
    mov ebx, [rsi + 0x228]
1:  mov al, [rbx]
    inc rbx
    test al, al
    jz 2f
    mov dx, 0x3f8
    out dx, al
    jmp 1b
2:  mov al, 0xfe
    out 0x64, al
    hlt
    jmp 2b
    .org 0x800";
    let prepare = |config: &mut MachineConfig| config.cmdline = "sixty-four".into();
    check(text, Format::Flat64, prepare, (Outcome::Reset, "sixty-four"));
}

#[test]
fn a_triple_fault_ends_the_machine() {
    let text = format!(
        "{MULTIBOOT}
        mov word ptr [0x7ff0], 0
        lidt [0x7ff0]
        ud2"
    );
    check(&text, Format::Elf32, nothing, (Outcome::TripleFault, ""));
}

#[test]
fn the_pit_interrupts_through_the_8259_pair() {
    let text = format!(
        "{}{MULTIBOOT}
        gate 0x20, tick
        load_table
        init_pic
        mov al, 0x34; out 0x43, al
        mov al, 0xa9; out 0x40, al
        mov al, 0x04; out 0x40, al
        xor ebp, ebp
        sti
    2:  sti
        hlt
        cmp ebp, 20
        jb 2b
        mov al, 20; out 0xf4, al
        hlt
    tick:
        inc ebp
        mov al, 0x20; out 0x20, al
        finish",
        gates("0xfe")
    );
    check(&text, Format::Elf32, nothing, (Outcome::DebugExit(20), ""));
}

#[test]
fn the_apic_timer_interrupts_in_all_its_modes() {
    let text = format!(
        "{}{MULTIBOOT}
        gate 0x40, tick
        load_table
        # Through MMIO: software enable, divide by 1, periodic, one millisecond.
        mov ebx, 0xfee00000
        mov dword ptr [ebx + 0xf0], 0x1ff
        mov dword ptr [ebx + 0x350], 0x10700
        mov dword ptr [ebx + 0x3e0], 11
        xor ebp, ebp
        mov dword ptr [ebx + 0x320], 0x20040
        mov dword ptr [ebx + 0x380], 1000000
        sti
    2:  sti
        hlt
        cmp ebp, 10
        jb 2b
        # One-shot.
        cli
        mov dword ptr [ebx + 0x380], 0
        mov dword ptr [ebx + 0x320], 0x40
        xor ebp, ebp
        mov dword ptr [ebx + 0x380], 500000
        sti
    3:  sti
        hlt
        cmp ebp, 1
        jb 3b
        cli
        cmp dword ptr [ebx + 0x390], 0
        jne fail
        # TSC deadline.
        mov dword ptr [ebx + 0x320], 0x40040
        xor ebp, ebp
        rdtsc
        add eax, 1000000
        adc edx, 0
        mov esi, eax
        mov edi, edx
        mov ecx, 0x6e0
        wrmsr
        sti
    4:  sti
        hlt
        cmp ebp, 1
        jb 4b
        rdtsc
        sub eax, esi
        sbb edx, edi
        js fail
        mov al, 7; out 0xf4, al
        hlt
    tick:
        inc ebp
        mov dword ptr [ebx + 0xb0], 0
        finish",
        gates("0xff")
    );
    check(&text, Format::Elf32, nothing, (Outcome::DebugExit(7), ""));
}

#[test]
fn other_processors_start_and_interrupt_the_first() {
    let text = format!(
        "{}{MULTIBOOT}
        gate 0x41, hello
        load_table
        # The code of the others, in real mode at 0x9000: count, then wait for the word.
        mov esi, offset real
        mov edi, 0x9000
        mov ecx, offset real_end - real
        rep movsb
        mov dword ptr [0x6000], 0
        mov ebx, 0xfee00000
        mov dword ptr [ebx + 0xf0], 0x1ff
        mov dword ptr [ebx + 0x300], 0xc4500
        mov dword ptr [ebx + 0x300], 0xc4609
        xor ebp, ebp
    2:  pause
        cmp dword ptr [0x6000], 3
        jb 2b
        mov dword ptr [0x6004], 1
        sti
    3:  sti
        hlt
        cmp ebp, 1
        jb 3b
        mov al, 5; out 0xf4, al
        hlt
    hello:
        inc ebp
        mov dword ptr [ebx + 0xb0], 0
        finish
        .code16
    real:
        xor ax, ax
        mov ds, ax
        mov eax, 1
        cpuid
        shr ebx, 24
        lock inc dword ptr [0x6000]
    4:  pause
        cmp dword ptr [0x6004], 1
        jne 4b
        cmp ebx, 2
        jne 5f
        # Number 2, in x2APIC mode, interrupts number 0.
        mov ecx, 0x1b
        rdmsr
        or ax, 0xc00
        wrmsr
        mov ecx, 0x80f
        mov eax, 0x1ff
        xor edx, edx
        wrmsr
        mov ecx, 0x830
        mov eax, 0x4041
        xor edx, edx
        wrmsr
    5:  hlt
        jmp 5b
    real_end:
        .code32",
        gates("0xff")
    );
    let prepare = |config: &mut MachineConfig| config.cpus = 4;
    check(&text, Format::Elf32, prepare, (Outcome::DebugExit(5), ""));
}

/// Echoes what comes over the serial port by interrupt through the I/O APIC, until a `q`.
fn echo() -> String {
    format!(
        "{}{MULTIBOOT}
        gate 0x44, received
        load_table
        mov ebx, 0xfee00000
        mov dword ptr [ebx + 0xf0], 0x1ff
        mov ecx, 0xfec00000
        mov dword ptr [ecx], 0x19
        mov dword ptr [ecx + 0x10], 0
        mov dword ptr [ecx], 0x18
        mov dword ptr [ecx + 0x10], 0x44
        mov dx, 0x3fc; mov al, 0x0b; out dx, al
        mov dx, 0x3f9; mov al, 1; out dx, al
        sti
    2:  sti
        hlt
        jmp 2b
    received:
        mov dx, 0x3fd
        in al, dx
        test al, 1
        jz 3f
        mov dx, 0x3f8
        in al, dx
        cmp al, 'q'
        je 4f
        call putc
        jmp received
    3:  mov dword ptr [ebx + 0xb0], 0
        finish
    4:  mov al, 1; out 0xf4, al
        hlt",
        gates("0xff")
    )
}

#[test]
fn serial_input_is_neither_lost_nor_reordered() {
    for accel in processors() {
        let folder = Folder::new();
        let kernel = assemble(&folder, &echo(), Format::Elf32);
        let socket = folder.0.join("socket");
        let mut config = MachineConfig::new(kernel);
        config.accel = accel;
        config.memory_bytes = 32 << 20;
        config.debug_exit = true;
        config.serial = SerialConfig::Socket(socket.clone());
        let machine = Machine::start(&config).unwrap();
        let mut stream = UnixStream::connect(&socket).unwrap();
        // More than all queues hold.
        let sent: Vec<u8> = (0..20_000u32).map(|i| b'A' + (i * i % 26) as u8).collect();
        let mut writer = stream.try_clone().unwrap();
        let data = sent.clone();
        let sender = std::thread::spawn(move || writer.write_all(&data).unwrap());
        let mut got = vec![0; sent.len()];
        stream.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
        let read = stream.read_exact(&mut got);
        assert!(read.is_ok(), "{accel:?}: {read:?}, {:?}", machine.ending().outcome());
        sender.join().unwrap();
        assert!(got == sent, "{accel:?}: bytes differ");
        stream.write_all(b"q").unwrap();
        assert_eq!(machine.wait(), Outcome::DebugExit(1), "{accel:?}");
    }
}

#[test]
fn a_machine_stops_from_outside_whatever_it_does() {
    // Spins, sleeps for good, or floods the console.
    for body in ["2: jmp 2b", "cli\n hlt", "2: mov al, 'x'\n call putc\n jmp 2b"] {
        for accel in processors() {
            let folder = Folder::new();
            let kernel = assemble(&folder, &format!("{MULTIBOOT}{body}"), Format::Elf32);
            let mut config = MachineConfig::new(kernel);
            config.accel = accel;
            config.memory_bytes = 32 << 20;
            config.serial = SerialConfig::Null;
            config.cpus = 2;
            let machine = Machine::start(&config).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(100));
            machine.stop();
            assert_eq!(machine.wait(), Outcome::Stopped, "{accel:?} {body}");
        }
    }
}

#[test]
fn without_the_debug_exit_port_writes_to_it_do_nothing() {
    let text = format!("{MULTIBOOT} mov al, 1\n out 0xf4, al\n mov al, 0xfe\n out 0x64, al\n hlt");
    let prepare = |config: &mut MachineConfig| config.debug_exit = false;
    check(&text, Format::Elf32, prepare, (Outcome::Reset, ""));
}

#[test]
fn rubbish_in_ports_msrs_and_apics_is_contained() {
    // Writes a running pattern to all ports but those that end the machine, to the APICs' pages
    // and to MSRs around theirs (with a #GP handler that skips the instruction), then ends.
    let text = format!(
        "{}{MULTIBOOT}
        gate 13, skip
        load_table
        xor ebp, ebp
        mov esi, 0x12345678
    2:  movzx edx, bp
        cmp edx, 0x60; je 3f
        cmp edx, 0x64; je 3f
        cmp edx, 0x92; je 3f
        cmp edx, 0xf4; je 3f
        cmp edx, 0x600; je 3f
        cmp edx, 0x602; je 3f
        cmp edx, 0xcf9; je 3f
        # Output would be compared.
        mov eax, edx
        and eax, 0xfff8
        cmp eax, 0x3f8; je 3f
        imul esi, esi, 1103515245
        add esi, 12345
        mov eax, esi
        out dx, al
        in al, dx
    3:  inc ebp
        cmp ebp, 0x2000
        jb 2b
        mov ebx, 0xfec00000
        call pages
        mov ebx, 0xfee00000
        # All but the command register, which could send INIT.
        mov dword ptr [ebx + 0x300], 0
        call pages
        mov ecx, 0x800
    4:  cmp ecx, 0x830
        je 5f
        mov eax, esi
        mov edx, esi
        wrmsr
        rdmsr
    5:  inc ecx
        cmp ecx, 0x900
        jb 4b
        mov al, 9; out 0xf4, al
        hlt
    pages:
        xor ecx, ecx
    6:  cmp ecx, 0x300
        je 7f
        imul esi, esi, 1103515245
        add esi, 12345
        mov [ebx + ecx], esi
        mov eax, [ebx + ecx]
        mov [ebx + ecx], al
        mov ax, [ebx + ecx + 1]
    7:  add ecx, 4
        cmp ecx, 0xff8
        jb 6b
        ret
    skip:
        # WRMSR and RDMSR are 2 bytes long.
        add dword ptr [esp + 4], 2
        add esp, 4
        finish",
        gates("0xff")
    );
    check(&text, Format::Elf32, nothing, (Outcome::DebugExit(9), ""));
}

#[test]
fn a_guest_that_is_too_big_is_an_error_of_the_start() {
    let folder = Folder::new();
    let kernel = assemble(&folder, &format!("{MULTIBOOT} .fill 8 << 20"), Format::Elf32);
    let mut config = MachineConfig::new(kernel);
    config.memory_bytes = 4 << 20;
    let error = Machine::start(&config).err().unwrap().to_string();
    assert!(error.contains("--memory"), "{error}");
    config.cpus = 17;
    assert!(Machine::start(&config).is_err());
}

#[test]
fn a_jump_to_the_bios_resets_the_machine() {
    // As Linux does: back to real mode through a 16-bit segment, then to the BIOS.
    let text = format!(
        "{MULTIBOOT}
        mov dword ptr [0x7000], 0
        mov dword ptr [0x7004], 0
        mov dword ptr [0x7008], 0x0000ffff
        mov dword ptr [0x700c], 0x00009b00
        mov dword ptr [0x7010], 0x0000ffff
        mov dword ptr [0x7014], 0x00009300
        mov word ptr [0x7020], 0x17
        mov dword ptr [0x7022], 0x7000
        lgdt [0x7020]
        mov esi, offset real
        mov edi, 0x6000
        mov ecx, offset real_end - real
        rep movsb
        jmp 8:0x6000
        .code16
    real:
        mov ax, 16
        mov ds, ax
        mov ss, ax
        mov eax, cr0
        and al, 0xfe
        mov cr0, eax
        .byte 0xea
        .word 0xfff0, 0xf000
    real_end:
        .code32"
    );
    check(&text, Format::Elf32, nothing, (Outcome::Reset, ""));
}
