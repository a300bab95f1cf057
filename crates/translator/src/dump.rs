//! Blocks as text: what was translated, and what was made of it (`berth vm run --dump-blocks`).

use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::mem::offset_of;
use std::sync::{Arc, Mutex};

use berth_x86::{CpuState, Segment};
use iced_x86::{
    Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter, Register, SymbolResolver,
    SymbolResult,
};

use crate::code::Made;
use crate::layout::{
    Area, ExitCode, FLAG_MASKS, Gate, JC_TAGS, JC_TARGETS, disp, gpr_disp, state_disp,
};
use crate::shared::lock;
use crate::thunks::Thunks;
use crate::translate::Mode;

/// Where translated blocks are listed; clones write to the same place.
#[derive(Clone)]
pub struct Dump(Arc<Mutex<dyn Write + Send>>);

impl fmt::Debug for Dump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dump")
    }
}

impl Dump {
    /// Lists blocks there. What cannot be written is lost.
    pub fn new(out: impl Write + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(out)))
    }

    /// Writes what is buffered.
    ///
    /// # Errors
    /// The writer's.
    pub fn flush(&self) -> io::Result<()> {
        lock(&self.0).flush()
    }

    /// Lists a block: the guest's code, the body at `hosts.0`, and the cold part at `hosts.1`.
    pub(crate) fn block(
        &self,
        mode: Mode,
        guest: &[u8],
        made: &Made<'_>,
        hosts: (u64, u64),
        thunks: Thunks,
    ) {
        let Mode { bits, user, .. } = mode;
        let mut text = format!(
            "guest {:#x}, physical {:#x}, {bits} bits, {}\n",
            made.key.rip,
            made.key.gpa,
            if user { "user" } else { "supervisor" }
        );
        list(&mut text, bits, guest, made.key.rip, made.key.rip, None);
        let (body, cold) = (made.code.len() as u64, made.cold.len() as u64);
        let names = || Names { thunks, at: hosts.0, len: body, apart: (hosts.1, cold) };
        let _ = writeln!(text, "host, {body} bytes");
        list(&mut text, 64, made.code, hosts.0, 0, Some(names()));
        if cold != 0 {
            let _ = writeln!(text, "host, apart, {cold} bytes");
            list(&mut text, 64, made.cold, hosts.1, 0, Some(names()));
        }
        text.push('\n');
        // A full disk must not stop the guest.
        let _ = lock(&self.0).write_all(text.as_bytes());
    }
}

/// Names of what host code refers to.
pub struct Names {
    /// The fixed pieces.
    pub thunks: Thunks,
    /// Address of the block.
    pub at: u64,
    /// Its bytes.
    pub len: u64,
    /// Address and length of a part of it that lies elsewhere.
    pub apart: (u64, u64),
}

impl Names {
    fn place(&self, address: u64) -> String {
        if let Some(offset) = address.checked_sub(self.at).filter(|o| *o <= self.len) {
            return format!("+{offset:x}");
        }
        if let Some(offset) = address.checked_sub(self.apart.0).filter(|o| *o <= self.apart.1) {
            return format!("apart +{offset:x}");
        }
        let t = &self.thunks;
        let exits = [
            (ExitCode::Link, "exit_link"),
            (ExitCode::Indirect, "exit_indirect"),
            (ExitCode::Interrupt, "exit_interrupt"),
            (ExitCode::Helper, "exit_helper"),
            (ExitCode::Fault, "exit_fault"),
            (ExitCode::Return, "exit_return"),
        ];
        let calls = [
            (t.mem, "mem"),
            (t.commit, "commit"),
            (t.helper, "helper"),
            (t.miss, "miss"),
            (t.unmatched, "unmatched"),
        ];
        let mut all = exits.map(|(code, name)| (t.exit(code), name)).into_iter().chain(calls);
        all.find(|(a, _)| *a == address).map_or("elsewhere".into(), |(_, name)| name.into())
    }

    /// What is at a displacement from the GS base.
    fn field(displacement: i32) -> Option<String> {
        for n in 0..16u8 {
            if displacement == gpr_disp(n) {
                return Some(format!("guest_{:?}", Register::RAX + u32::from(n)).to_lowercase());
            }
        }
        for (n, name) in ["es", "cs", "ss", "ds", "fs", "gs"].iter().enumerate() {
            let base = offset_of!(CpuState, seg) + n * size_of::<Segment>();
            if displacement == state_disp(base + offset_of!(Segment, base)) {
                return Some(format!("guest_{name}_base"));
            }
            if displacement == state_disp(base + 8) {
                return Some(format!("guest_{name}_rest"));
            }
            if displacement == state_disp(base + offset_of!(Segment, selector)) {
                return Some(format!("guest_{name}_selector"));
            }
        }
        let words = [
            (offset_of!(Area, page_mask), 2, "page_mask"),
            (offset_of!(Area, slot_mask), crate::layout::MAX_ACCESS_SHIFT + 1, "slot_mask"),
            (offset_of!(Area, bit_mask), 4, "bit_mask"),
            (offset_of!(Area, windows), crate::layout::WINDOWS, "window"),
            (offset_of!(Area, flag_mask), FLAG_MASKS.len(), "flag_mask"),
            (offset_of!(Area, kernel_base), 2, "kernel_base"),
            (offset_of!(Area, run_mask), 4, "run_mask"),
            (offset_of!(Area, syscall), size_of::<Gate>() / 8, "syscall"),
            (offset_of!(Area, sysret), size_of::<Gate>() / 8, "sysret"),
        ];
        for (offset, count, name) in words {
            for i in 0..count {
                if displacement == disp(offset + i * 8) {
                    return Some(format!("{name}_{i}"));
                }
            }
        }
        let single = [
            (disp(offset_of!(Area, run)), "run"),
            (disp(offset_of!(Area, exit_arg)), "exit_arg"),
            (disp(offset_of!(Area, exit_rip)), "exit_rip"),
            (disp(offset_of!(Area, look_s1)), "look_s1"),
            (disp(offset_of!(Area, return_number)), "return_number"),
            (disp(offset_of!(Area, tmp)), "tmp"),
            (disp(offset_of!(Area, irq)), "irq"),
            (disp(offset_of!(Area, shadow_rip)), "shadow_rip"),
            (state_disp(offset_of!(CpuState, rflags)), "rflags"),
            (state_disp(offset_of!(CpuState, interrupt_shadow)), "interrupt_shadow"),
            (state_disp(offset_of!(CpuState, kernel_gs_base)), "kernel_gs_base"),
            (disp(offset_of!(Area, syscall_keep)), "syscall_keep"),
            (disp(offset_of!(Area, syscalls)), "syscalls"),
            (disp(offset_of!(Area, user_return_sp)), "user_return_sp"),
            (disp(offset_of!(Area, crossed)), "crossed"),
            (disp(offset_of!(Area, barrier)), "barrier"),
            (state_disp(offset_of!(CpuState, lstar)), "lstar"),
            (state_disp(offset_of!(CpuState, tsc_offset)), "tsc_offset"),
            (state_disp(offset_of!(CpuState, tsc_aux)), "tsc_aux"),
            (state_disp(offset_of!(CpuState, xcr0)), "xcr0"),
            (state_disp(offset_of!(CpuState, xcr0) + 4), "xcr0_high"),
            (state_disp(offset_of!(CpuState, cr2)), "cr2"),
            (state_disp(offset_of!(CpuState, cr3)), "cr3"),
            (disp(offset_of!(Area, df_mask)), "df_mask"),
            (disp(offset_of!(Area, string_flags)), "string_flags"),
            (JC_TAGS, "jump_cache_tags"),
            (JC_TARGETS, "jump_cache_targets"),
        ];
        let entry = || {
            let offset = displacement.checked_sub(JC_TAGS).filter(|o| (0..16 << 16).contains(o))?;
            let part = if offset % 16 == 0 { "tag" } else { "target" };
            Some(format!("jump_cache_{part}_{:x}", offset / 16))
        };
        let named = single.iter().find(|(d, _)| *d == displacement);
        named.map(|(_, name)| (*name).into()).or_else(entry)
    }
}

impl SymbolResolver for Names {
    fn symbol(
        &mut self,
        ins: &Instruction,
        _: u32,
        operand: Option<u32>,
        address: u64,
        _: u32,
    ) -> Option<SymbolResult<'_>> {
        let kind = operand.map(|n| ins.op_kind(n));
        if kind == Some(iced_x86::OpKind::NearBranch64) {
            return Some(SymbolResult::with_string(address, self.place(address)));
        }
        let gs = kind == Some(iced_x86::OpKind::Memory) && ins.segment_prefix() == Register::GS;
        let name = Self::field(address as i32).filter(|_| gs)?;
        Some(SymbolResult::with_string(address, name))
    }
}

/// Lists code at `at`, whose first byte is shown at `shown`.
pub fn list(text: &mut String, bits: u8, code: &[u8], at: u64, shown: u64, names: Option<Names>) {
    let resolver = names.map(|n| Box::new(n) as Box<dyn SymbolResolver>);
    let mut formatter = IntelFormatter::with_options(resolver, None);
    let options = formatter.options_mut();
    options.set_space_after_operand_separator(true);
    options.set_branch_leading_zeros(false);
    options.set_show_symbol_address(false);
    for ins in &mut Decoder::with_ip(u32::from(bits), code, at, DecoderOptions::NONE) {
        let mut line = String::new();
        formatter.format(&ins, &mut line);
        // Writing to a string does not fail.
        let _ = writeln!(text, "{:6x}  {line}", ins.ip() - at + shown);
    }
}
