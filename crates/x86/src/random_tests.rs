//! Random tables and frames: nothing panics, and whatever fails leaves the registers alone.

use crate::event::{Event, deliver, deliver_with_escalation};
use crate::fake::{Flat, GDT, IDT, STACK, TSS, descriptor, gate, gdt, long, protected, real};
use crate::far::{far_call, far_jump, far_ret, iret, lar, lldt, load_segment, lsl, ltr};
use crate::paging::{Kind, Rights, walk};
use crate::size::OpSize::{Bits16, Bits32, Bits64};
use crate::state::{CpuState, Exception, cr0, cr4, efer, reg, sreg};

const ROUNDS: usize = 12_000;

/// Marsaglia's xorshift; the seed is fixed, so a failure repeats.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    fn selector(&mut self) -> u16 {
        match self.below(20) {
            0 => self.next() as u16,
            _ => (self.below(24) * 8 + self.below(4)) as u16,
        }
    }

    fn offset(&mut self) -> u64 {
        let any = self.next();
        self.pick(&[0x1234, 0x4_5678, 1 << 47, u64::MAX, 0xffff_8000_0000_0000, any])
    }
}

fn scene(random: &mut Random) -> (CpuState, Flat) {
    let mem = Flat::new();
    let mode = random.below(5);
    let cpl = random.pick(&[0, 0, 1, 3, 3]);
    let mut cpu = match mode {
        0 => real(),
        1 | 2 => protected(cpl),
        _ => long(cpl),
    };
    gdt(&mem, cpu.long_mode());
    for slot in 1..24 {
        if random.below(4) == 0 {
            let attr = random.next() as u16;
            let mut raw = descriptor(attr & 0xf0ff);
            if random.below(3) == 0 {
                raw =
                    gate(random.selector(), random.offset(), attr as u8, random.below(4) as u8)[0];
            }
            mem.put64(GDT + slot * 8, raw);
        }
    }
    for slot in 0..512 {
        let typ = random.pick(&[0x8e, 0xee, 0x8f, 0x86, 0x85, 0x0e, random.0 as u8]);
        let halves = gate(random.selector(), random.offset(), typ, random.below(8) as u8);
        mem.put64(IDT + slot * 8, halves[(slot & 1) as usize * usize::from(cpu.long_mode())]);
    }
    for slot in 0..16 {
        let any = random.next();
        let value = random.pick(&[0xa000, 0x10_0000_a000, 1 << 47, any, 0xb000]);
        mem.put64(TSS + 4 + slot * 8, value);
    }
    let size = random.pick(&[2, 4, 8]);
    for slot in 0..6 {
        let value = match slot {
            1 | 4 => u64::from(random.selector()),
            2 => random.next(),
            _ => random.offset(),
        };
        let bytes = value.to_le_bytes();
        for (i, byte) in (0..).zip(&bytes[..size]) {
            mem.put(STACK + slot * size as u64 + i, [*byte]);
        }
    }
    if random.below(8) == 0 {
        cpu.gpr[reg::RSP] = random.offset();
    }
    cpu.rflags |= random.next() & 0x3f_7fd5;
    cpu.nmi_masked = random.below(2) as u32;
    (cpu, mem)
}

fn act(random: &mut Random, cpu: &mut CpuState, mem: &mut Flat) -> Result<(), Exception> {
    let size = if cpu.long_mode() {
        random.pick(&[Bits16, Bits32, Bits64])
    } else {
        random.pick(&[Bits16, Bits32])
    };
    let selector = random.selector();
    let vector = random.next() as u8;
    match random.below(10) {
        0 => deliver(cpu, mem, Event::Interrupt(vector)),
        1 => deliver(cpu, mem, Event::SoftInt { vector, next_rip: 0x1236 }),
        2 => deliver(cpu, mem, Event::Exception(Exception::pf(random.next(), 7))),
        3 | 4 => iret(cpu, mem, size),
        5 => far_jump(cpu, mem, selector, random.offset(), size),
        6 => far_call(cpu, mem, selector, random.offset(), size, 0x1236),
        7 => far_ret(cpu, mem, size, random.below(64) as u16),
        8 => load_segment(cpu, mem, random.below(8) as usize, selector),
        _ if random.below(2) == 0 => lldt(cpu, mem, selector),
        _ => ltr(cpu, mem, selector),
    }
}

#[test]
fn faults_leave_the_registers_alone() {
    let mut random = Random(0x1234_5678_9abc_def1);
    let (mut done, mut faults) = (0, 0);
    for round in 0..ROUNDS {
        let (mut cpu, mut mem) = scene(&mut random);
        let before = cpu.clone();
        if act(&mut random, &mut cpu, &mut mem).is_ok() {
            done += 1;
            assert_eq!(cpu.rflags & 2, 2);
            let level = (cpu.seg[sreg::CS].selector & 3) as u8;
            assert!(cpu.real_segments() || level == cpu.cpl(), "round {round}: CS and SS disagree");
            continue;
        }
        faults += 1;
        if mem.task_entered {
            // It is one of the new task.
            continue;
        }
        cpu.nmi_masked = before.nmi_masked;
        cpu.cr2 = before.cr2;
        assert_eq!(cpu, before, "round {round}");
        // Queries and escalation end, whatever the tables hold.
        let selector = random.selector();
        let _ = (lar(&mut cpu, &mut mem, selector), lsl(&mut cpu, &mut mem, selector));
        let _ = deliver_with_escalation(&mut cpu, &mut mem, Event::Exception(Exception::gp(0)));
    }
    assert!(done > ROUNDS / 20 && faults > ROUNDS / 20, "{done} {faults}");
}

#[test]
fn random_page_tables() {
    let mut random = Random(0xfeed_beef_1357_2468);
    let mem = Flat::new();
    let (mut found, mut faults) = (0, 0);
    for _ in 0..ROUNDS {
        let mut cpu = protected(random.pick(&[0, 3]));
        cpu.cr0 |= cr0::PG | random.next() & cr0::WP;
        cpu.cr3 = random.below(8) << 12;
        cpu.cr4 = random.next() & (cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP | cr4::SMAP);
        if random.below(2) == 0 {
            cpu.cr4 |= cr4::PAE;
            cpu.efer = efer::LME | efer::LMA | random.next() & efer::NXE;
        }
        let entry = |random: &mut Random| {
            let noise = random.next() & random.next() & random.next() & random.next();
            let odd = if random.below(8) == 0 { noise } else { noise & 0xf7f };
            random.below(8) << 12 | odd | if random.below(8) == 0 { 0 } else { 7 }
        };
        cpu.pdpte = [entry(&mut random), entry(&mut random), 0, entry(&mut random)];
        for _ in 0..64 {
            let at = random.below(0x1000) * 8;
            mem.put64(at, entry(&mut random));
        }
        let kind = random.pick(&[Kind::Read, Kind::Write, Kind::Fetch]);
        let rights = if random.below(4) == 0 {
            Rights::system(&cpu, kind)
        } else {
            Rights::explicit(&cpu, kind)
        };
        let va = random.next();
        match walk(&mem, &cpu, va, rights) {
            Ok(walk) => {
                found += 1;
                assert_eq!(walk.gpa & 0xfff, va & 0xfff);
                assert!(kind != Kind::Write || walk.dirty);
                assert!(!rights.user || walk.readable_user);
                // The same access again finds the same and has nothing left to set.
                let bytes = mem.snapshot();
                assert_eq!(crate::paging::walk(&mem, &cpu, va, rights), Ok(walk));
                assert_eq!(mem.snapshot(), bytes);
            }
            Err(exception) => {
                faults += 1;
                assert_eq!(exception.vector, 14);
            }
        }
    }
    assert!(found > 1000 && faults > 1000, "{found} {faults}");
}
