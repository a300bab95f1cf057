//! What a vCPU has translated is of use to that of a clone.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use berth_translator::{
    Config, Exit, Frozen, Origin, RamSlot, Reservation, Shared, SharedCode, TakenCode,
    TranslatedVcpu, host_cpuid,
};
use berth_x86::CpuState;
use berth_x86::cpuid::{CpuidTable, Topology};

use crate::{CODE, Counter, RAM, guest, memfd};

/// Where the guest adds up.
const SUM: u64 = 0x30_0000;
/// A function in another page than what calls it.
const FUNCTION: u64 = CODE + 0x1000;
/// Where in it the number is that it adds.
const NUMBER: u64 = FUNCTION + 1;

/// A machine whose guest adds a number to a sum, and halts, again and again.
struct Machine {
    shared: Arc<Shared>,
    mapping: Arc<Reservation>,
    vcpu: TranslatedVcpu,
}

impl Machine {
    fn new(fd: &OwnedFd, state: CpuState, begin: Option<(&Origin, &SharedCode)>) -> Self {
        Self::with(fd, state, begin, Config::default())
    }

    fn with(
        fd: &OwnedFd,
        state: CpuState,
        begin: Option<(&Origin, &SharedCode)>,
        config: Config,
    ) -> Self {
        let mapping = Arc::new(Reservation::new(RAM as usize).unwrap());
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        mapping.map_file(0, RAM as usize, prot, fd.as_raw_fd(), 0).unwrap();
        let slots = [RamSlot { gpa: 0, size: RAM, fd: fd.as_fd(), offset: 0 }];
        let raw = Some(Arc::clone(&mapping));
        let origin = begin.map(|(origin, _)| origin);
        let code = begin.and_then(|(_, code)| TakenCode::new(&config, code));
        let shared = Shared::with_mapping(&slots, raw, origin, config).unwrap();
        let cpuid = CpuidTable::new(&host_cpuid(), Topology { index: 0, count: 1 }, 1_000_000);
        let platform = Box::<Counter>::default();
        let vcpu = TranslatedVcpu::with_code(Arc::clone(&shared), state, cpuid, platform, code);
        Self { shared, mapping, vcpu: vcpu.unwrap() }
    }

    fn begin() -> (Self, OwnedFd) {
        // L: call FUNCTION; inc ebx; hlt; jmp L
        let mut code = vec![0xe8, 0xfb, 0x0f, 0, 0, 0xff, 0xc3, 0xf4, 0xeb, 0xf6];
        code.resize((FUNCTION - CODE) as usize, 0xf4);
        // mov edx, 1; mov edi, SUM; add [rdi], rdx; ret
        code.extend([0xba, 1, 0, 0, 0, 0xbf, 0, 0, 0x30, 0, 0x48, 0x01, 0x17, 0xc3]);
        let (state, fd) = guest(&code);
        (Self::new(&fd, state, None), fd)
    }

    /// Goes round once more; gives the sum.
    fn round(&mut self) -> u64 {
        if self.vcpu.state().halted != 0 {
            self.vcpu.state_mut().halted = 0;
        }
        assert_eq!(self.vcpu.run(), Exit::Halted);
        self.shared.before_access(SUM, 8, false);
        // SAFETY: inside the mapping, which nobody writes now.
        unsafe { ((self.mapping.addr() + SUM) as *const u64).read_volatile() }
    }

    /// The function adds another number from here on.
    fn add(&self, number: u8) {
        self.shared.before_access(NUMBER, 1, true);
        // SAFETY: inside the mapping, which is writable there since that was said.
        unsafe { ((self.mapping.addr() + NUMBER) as *mut u8).write_volatile(number) };
        self.shared.ram_written(NUMBER, 1);
    }

    fn keep(&mut self) -> (SharedCode, Frozen) {
        (self.vcpu.share_code().unwrap(), self.shared.freeze(memfd()).unwrap())
    }

    /// A clone that is about to go on.
    fn cloned(&self, code: &SharedCode, frozen: &Frozen) -> Self {
        let mut state = self.vcpu.state().clone();
        state.halted = 0;
        Self::new(&memfd(), state, Some((&frozen.origin, code)))
    }

    fn translated(&self) -> u64 {
        self.vcpu.stats().blocks
    }
}

#[test]
fn clones_translate_nothing_anew() {
    let (mut first, _fd) = Machine::begin();
    for sum in 1..5 {
        assert_eq!(first.round(), sum);
    }
    assert!(first.translated() > 0);
    let (code, frozen) = first.keep();
    let mut clones: Vec<_> = (0..3).map(|_| first.cloned(&code, &frozen)).collect();
    for (sum, clone) in (5..).zip(&mut clones) {
        for sum in 5..=sum {
            assert_eq!(clone.round(), sum);
        }
        assert_eq!(clone.translated(), 0, "all of it was there");
    }
    // Each changes its own code and memory only.
    for (number, clone) in (10..).zip(&mut clones) {
        clone.add(number);
    }
    for ((number, sum), clone) in (10..).zip(5..).zip(&mut clones) {
        assert_eq!(clone.round(), sum + number);
        assert!(clone.translated() > 0, "the function was another one");
    }
    assert_eq!(first.round(), 5);
    first.add(100);
    assert_eq!(first.round(), 105);
    for ((number, sum), clone) in (10..).zip(5..).zip(&mut clones) {
        assert_eq!(clone.round(), sum + 2 * number);
    }
    assert_eq!(first.cloned(&code, &frozen).round(), 5);
}

#[test]
fn what_clones_write_is_copied_ahead() {
    let (mut first, _fd) = Machine::begin();
    for sum in 1..5 {
        assert_eq!(first.round(), sum);
    }
    let (mut code, mut frozen) = first.keep();
    let has = |ranges: &[Range<u64>], gpa: u64| ranges.iter().any(|r| r.contains(&(gpa / 4096)));
    let all = 0..u64::MAX;
    for round in 0..4 {
        let mut clone = first.cloned(&code, &frozen);
        assert_eq!(clone.round(), 5);
        assert_eq!(clone.translated(), 0);
        clone.add(9);
        assert_eq!(clone.round(), 14);
        // What was copied in vain is not told.
        let written = clone.shared.written().unwrap();
        assert!(has(&written.ram, SUM) && has(&written.ram, NUMBER), "{written:?}");
        assert!(!has(&written.ram, CODE) && !has(&written.ram, SUM + 0x5000), "{written:?}");
        assert!(!written.code[0].is_empty());
        assert_eq!(clone.shared.written().unwrap().ram, [], "it is told once");
        assert_eq!(clone.round(), 23);
        if round < 2 {
            (frozen.origin.ahead, code.pages.ahead) = (written.ram, written.code[0].clone());
        } else {
            frozen.origin.ahead = vec![all.clone()];
            code.pages.ahead = vec![all.clone()];
        }
        // A clone of it has both.
        let (code, frozen) = clone.keep();
        assert_eq!(clone.cloned(&code, &frozen).round(), 32);
    }
    assert_eq!(first.round(), 5);
}

#[test]
fn clones_of_clones() {
    let (mut last, _fd) = Machine::begin();
    let mut all = Vec::new();
    let mut sum = 0;
    // Through more files than are kept apart.
    for generation in 0..60 {
        last.add(generation);
        sum += u64::from(generation);
        assert_eq!(last.round(), sum);
        let (code, frozen) = last.keep();
        let next = last.cloned(&code, &frozen);
        all.push((last, sum, generation));
        if all.len() > 10 {
            all.remove(3);
        }
        last = next;
    }
    for (machine, sum, number) in &mut all {
        assert_eq!(machine.round(), *sum + u64::from(*number));
    }
    // And more often from one.
    let (mut first, mut sum, number) = all.swap_remove(7);
    sum += u64::from(number);
    for _ in 0..60 {
        let (code, frozen) = first.keep();
        let mut clone = first.cloned(&code, &frozen);
        sum += u64::from(number);
        assert_eq!([clone.round(), first.round()], [sum, sum]);
    }
}

/// A cache that is filled again and again after it was cloned.
#[test]
fn what_is_inherited_is_dropped_like_other_code() {
    const BLOCKS: usize = 100_000;
    // L: BLOCKS times: inc eax; jmp to the next; then hlt; jmp L
    let mut code = Vec::new();
    for _ in 0..BLOCKS {
        code.extend([0xff, 0xc0, 0xeb, 4, 0xf4, 0xf4, 0xf4, 0xf4]);
    }
    code.extend([0xf4, 0xe9]);
    code.extend((-(BLOCKS as i32 * 8 + 6)).to_le_bytes());
    let (state, fd) = guest(&code);
    let config = Config { code_cache_bytes: 4 << 20, ..Config::default() };
    let mut first = Machine::with(&fd, state, None, config.clone());
    first.round();
    for _ in 0..3 {
        let (code, frozen) = first.keep();
        let mut state = first.vcpu.state().clone();
        state.halted = 0;
        let begin = Some((&frozen.origin, &code));
        let mut clone = Machine::with(&memfd(), state, begin, config.clone());
        let before = clone.vcpu.state().gpr[0];
        for _ in 0..3 {
            clone.round();
        }
        assert_eq!(clone.vcpu.state().gpr[0], before + 3 * BLOCKS as u64);
        assert!(clone.vcpu.stats().cache_drops >= 1, "{:?}", clone.vcpu.stats());
        first.round();
        assert_eq!(first.vcpu.state().gpr[0], before + BLOCKS as u64);
        first = clone;
    }
}

#[test]
fn code_of_others_is_not_used() {
    let (mut first, _fd) = Machine::begin();
    first.round();
    let (code, frozen) = first.keep();
    let mut cases = vec![SharedCode::default()];
    for n in 0..code.numbers.len() {
        for value in [0, !0, code.numbers[n] ^ 1 << 40] {
            // Which of these the code has, and whether blocks look for ends of pages, is not known.
            if !(5..8 + code.numbers[7] as usize).contains(&n) {
                let mut other = code.clone();
                other.numbers[n] = value;
                cases.push(other);
            }
        }
        cases.push(SharedCode { numbers: code.numbers[..n].to_vec(), ..code.clone() });
    }
    cases.push(SharedCode { guest_pages: vec![u64::MAX], ..code.clone() });
    cases.push(SharedCode { pages: Origin::default(), ..code.clone() });
    for case in cases {
        // It is refused, or of no harm as long as it is not run.
        first.cloned(&case, &frozen);
    }
    assert_eq!(first.cloned(&code, &frozen).round(), 2);
}
