//! Copies of pages of code that show only what is executed.
//!
//! Where the processor must not execute some instructions of a page, the process maps a copy of it,
//! full of HLT, which user code may not execute. What it stops at
//! is decoded, and what follows along direct jumps, and is shown if it may be executed. So every byte
//! that is shown belongs to an instruction that was reached, wherever in the page there are others.
//! Data between the code is never read from the copy: it can be executed only.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use fixedbitset::FixedBitSet;
use iced_x86::{Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, OpKind};

use super::scan::{Place, answers_differ, is_prefix};
use crate::ram::PAGE;
use crate::sys;
use crate::translate::LONGEST;

/// Bytes in a page.
const BYTES: usize = PAGE as usize;
/// HLT.
const HIDDEN: u8 = 0xf4;
/// Copies of a vCPU: 2 MiB.
const MOST: u16 = 512;

/// Where copies are.
pub struct Copies {
    file: File,
    free: Vec<u16>,
}

impl Copies {
    /// Room for copies, none so far.
    ///
    /// # Errors
    /// The system refuses the file.
    pub fn new() -> io::Result<Self> {
        let file = sys::memfd(c"berth-copies", u64::from(MOST) * PAGE)?;
        Ok(Self { file: file.into(), free: (0..MOST).collect() })
    }

    /// The file.
    pub fn fd(&self) -> i32 {
        self.file.as_raw_fd()
    }

    /// A page that shows nothing, if there is room.
    ///
    /// # Errors
    /// The system has no memory for it.
    pub fn take(&mut self) -> io::Result<Option<u16>> {
        let Some(at) = self.free.pop() else { return Ok(None) };
        self.file.write_all_at(&[HIDDEN; BYTES], u64::from(at) * PAGE)?;
        Ok(Some(at))
    }

    /// A page is not mapped any more when the process runs next.
    pub fn give_back(&mut self, page: u16) {
        self.free.push(page);
    }
}

/// What a copy shows.
#[derive(Debug)]
pub struct Copy {
    /// Its place in the file.
    pub page: u16,
    /// When it was mapped last.
    pub used: u64,
    /// First bytes of opcodes that are never shown.
    hidden: FixedBitSet,
    shown: FixedBitSet,
    /// Where instructions begin.
    begins: FixedBitSet,
    /// Accesses to the page as data.
    pub accesses: u32,
}

/// An instruction that is executed has one inside that must not be.
#[derive(Debug, PartialEq, Eq)]
pub struct Spoiled;

/// What [`Copy::reach`] did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// Everything that is new is in here.
    pub new: Range<usize>,
    /// Where an instruction begins that goes on in the next page.
    pub crossing: Option<usize>,
}

impl Copy {
    /// One that shows nothing, at a place in the file.
    pub fn new(page: u16, places: &[Place]) -> Self {
        let hidden = places.iter().map(|place| usize::from(place.opcode));
        let empty = || FixedBitSet::with_capacity(BYTES);
        let mut copy =
            Self { page, used: 0, hidden: empty(), shown: empty(), begins: empty(), accesses: 0 };
        hidden.for_each(|at| copy.hidden.insert(at));
        copy
    }

    /// Shows what is executed from an offset on. `code` is the page, with the beginning of the next one
    /// if it is known.
    ///
    /// # Errors
    /// The page must not be executed.
    pub fn reach(&mut self, code: &[u8], at: usize) -> Result<Reached, Spoiled> {
        let mut reached = Reached::default();
        let mut todo = vec![at];
        while let Some(at) = todo.pop() {
            if at >= BYTES || self.begins.contains(at) {
                continue;
            }
            let bytes = code.get(at..).unwrap_or_default();
            let bytes = bytes.get(..LONGEST).unwrap_or(bytes);
            let ins = Decoder::with_ip(64, bytes, at as u64, DecoderOptions::NONE).decode();
            let end = at + ins.len();
            if ins.is_invalid() {
                if code.len() == BYTES && at + LONGEST > BYTES {
                    reached.crossing = Some(at);
                }
                continue;
            }
            if let Some(hidden) = self.hidden_in(at..end) {
                if bytes.iter().take(hidden - at).all(|&b| is_prefix(b)) {
                    continue;
                }
                return Err(Spoiled);
            }
            if answers_differ(&ins) {
                continue;
            }
            self.begins.insert(at);
            self.show(code, at..end, &mut reached.new, false)?;
            todo.extend(follows(&ins, end));
        }
        Ok(reached)
    }

    /// Shows an instruction, and whatever those that begin inside it go on with: whoever jumps there
    /// gets what stands there. All of them may be real ones if it is `anything`; else what they begin
    /// with is, and what must not be executed behind it is still hidden.
    fn show(
        &mut self,
        code: &[u8],
        all: Range<usize>,
        new: &mut Range<usize>,
        anything: bool,
    ) -> Result<(), Spoiled> {
        let mut todo = vec![all];
        while let Some(bytes) = todo.pop() {
            for at in bytes.start..bytes.end.min(BYTES) {
                if self.shown.put(at) {
                    continue;
                }
                let start = if new.start == new.end { at } else { new.start.min(at) };
                *new = start..new.end.max(at + 1);
                let from = code.get(at..).unwrap_or_default();
                let mut decoder = Decoder::new(64, from, DecoderOptions::NONE);
                let ins = decoder.decode();
                // An invalid one is so by the bytes that were looked at.
                let end = match decoder.last_error() {
                    DecoderError::NoMoreBytes => BYTES,
                    _ => at + ins.len(),
                };
                let differs =
                    self.hidden_in(at..end).is_some() || !ins.is_invalid() && answers_differ(&ins);
                if differs && anything {
                    return Err(Spoiled);
                }
                if end > bytes.end && !differs {
                    todo.push(bytes.end..end);
                }
            }
        }
        Ok(())
    }

    /// The first of the opcodes in a range that are never shown.
    fn hidden_in(&self, range: Range<usize>) -> Option<usize> {
        self.hidden.ones().find(|hidden| range.contains(hidden))
    }

    /// Whether it shows an instruction that begins at an offset.
    pub fn begins(&self, at: usize) -> bool {
        self.begins.contains(at)
    }

    /// Shows what instructions that begin in the page before may end with, and what begins there.
    ///
    /// # Errors
    /// There is one inside that must not be executed.
    pub fn show_first(&mut self, code: &[u8], bytes: usize) -> Result<Range<usize>, Spoiled> {
        let mut new = 0..0;
        self.show(code, 0..bytes, &mut new, true)?;
        Ok(new)
    }

    /// Makes the copy in the file show what it is to show in a range.
    ///
    /// # Errors
    /// The system has no memory for it.
    pub fn write(&self, copies: &Copies, code: &[u8], new: Range<usize>) -> io::Result<()> {
        if new.is_empty() {
            return Ok(());
        }
        let shown = |at: usize| if self.shown.contains(at) { code[at] } else { HIDDEN };
        let start = new.start as u64;
        let bytes: Vec<u8> = new.map(shown).collect();
        copies.file.write_all_at(&bytes, u64::from(self.page) * PAGE + start)
    }
}

/// Bytes of a page that an instruction may end with that begins in the page before. `code` is what
/// stands on both sides of the boundary, [`LONGEST`] bytes each.
#[must_use]
pub fn tail(code: &[u8; 2 * LONGEST]) -> usize {
    let ends = (0..LONGEST)
        .map(|at| at + Decoder::new(64, &code[at..], DecoderOptions::NONE).decode().len());
    ends.max().unwrap_or(0).saturating_sub(LONGEST)
}

/// Where an instruction goes on, but for what it takes from registers or memory.
fn follows(ins: &Instruction, end: usize) -> impl Iterator<Item = usize> {
    let direct = ins.op_count() > 0 && ins.op0_kind() == OpKind::NearBranch64;
    let target = direct.then(|| usize::try_from(ins.near_branch_target()).ok()).flatten();
    let away = matches!(
        ins.flow_control(),
        FlowControl::UnconditionalBranch | FlowControl::IndirectBranch | FlowControl::Return
    );
    target.into_iter().chain((!away).then_some(end))
}

#[cfg(test)]
mod tests {
    use super::{BYTES, Copies, Copy, HIDDEN, LONGEST, Place, Spoiled, tail};

    /// A page of HLT but for `code` at 0x100; and a copy of it that hides an opcode.
    fn page(code: &[u8], opcode: Option<u16>) -> (Vec<u8>, Copy) {
        let mut page = vec![HIDDEN; BYTES];
        page[0x100..0x100 + code.len()].copy_from_slice(code);
        let places = opcode.map(|opcode| Place { first: opcode, opcode });
        (page, Copy::new(0, places.as_slice()))
    }

    #[test]
    fn what_is_reached_is_shown_and_nothing_else() {
        // 100: jz 106; nop; ret; (data) 104: nop; nop; 106: jmp 10a; 108: nop; nop; 10a: ret
        let code = [0x74, 4, 0x90, 0xc3, 0x90, 0x90, 0xeb, 2, 0x90, 0x90, 0xc3];
        let (page, mut copy) = page(&code, None);
        let reached = copy.reach(&page, 0x100).unwrap();
        assert_eq!((reached.new, reached.crossing), (0x100..0x10d, None));
        // The second byte of the second jump begins an addition of 6 bytes.
        assert!(copy.shown.ones().eq((0x100..0x104).chain(0x106..0x10d)));
        assert!(copy.reach(&page, 0x100).unwrap().new.is_empty());
        assert_eq!(copy.reach(&page, 0x104).unwrap().new, 0x104..0x106);
    }

    #[test]
    fn what_must_not_be_executed_is_not_shown() {
        // nop; vaddps zmm0, zmm0, zmm1; ret
        let code = [0x90, 0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1, 0xc3];
        for hidden in [None, Some(0x101)] {
            let (page, mut copy) = page(&code, hidden);
            assert_eq!(copy.reach(&page, 0x100).unwrap().new, 0x100..0x101);
            assert!(copy.reach(&page, 0x101).unwrap().new.is_empty());
        }
        // rex xgetbv
        let (rex, mut copy) = page(&[0x41, 0x0f, 1, 0xd0], Some(0x101));
        assert!(copy.reach(&rex, 0x100).unwrap().new.is_empty());
        // mov eax, (one that looks like XGETBV)
        let (page, mut copy) = page(&[0xb8, 0x0f, 1, 0xd0, 0, 0xc3], Some(0x101));
        assert_eq!(copy.reach(&page, 0x100), Err(Spoiled));
    }

    #[test]
    fn instructions_go_on_in_the_next_page() {
        let mut code = vec![0x90; BYTES + 15];
        // mov eax, 12345678h
        code[BYTES - 2..BYTES + 3].copy_from_slice(&[0xb8, 0x78, 0x56, 0x34, 0x12]);
        let mut copy = Copy::new(0, &[]);
        let first = copy.reach(&code[..BYTES], BYTES - 2).unwrap();
        assert_eq!((first.new.is_empty(), first.crossing), (true, Some(BYTES - 2)));
        assert_eq!(copy.reach(&code, BYTES - 2).unwrap().new, BYTES - 2..BYTES);
    }

    #[test]
    fn what_the_page_before_may_end_in_is_shown_whole() {
        // lea rsi, [rip + 2010h]; nops; vaddps zmm0, zmm0, zmm1
        let mut page = vec![0x90; BYTES];
        page[..7].copy_from_slice(&[0x48, 0x8d, 0x35, 0x10, 0x20, 0, 0]);
        page[30..36].copy_from_slice(&[0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1]);
        let mut copy = Copy::new(0, &[Place { first: 30, opcode: 30 }]);
        let new = copy.show_first(&page, 3).unwrap();
        assert!(new.start == 0 && (7..30).contains(&new.end));
        assert_eq!(Copy::new(0, &[]).show_first(&page, 31), Err(Spoiled));
        assert_eq!(copy.show_first(&page, 31), Err(Spoiled));
    }

    #[test]
    fn ends_of_instructions_are_foreseen() {
        let mut code = [0x90; 2 * LONGEST];
        assert_eq!(tail(&code), 0);
        // mov eax, 90909090h
        code[LONGEST - 2] = 0xb8;
        assert_eq!(tail(&code), 3);
    }

    #[test]
    fn the_file_shows_what_the_copy_does() {
        use std::os::unix::fs::FileExt;
        let mut copies = Copies::new().unwrap();
        let (page, mut copy) = page(&[0x90, 0xc3], None);
        copy.page = copies.take().unwrap().unwrap();
        let new = copy.reach(&page, 0x100).unwrap().new;
        copy.write(&copies, &page, new).unwrap();
        let mut there = [0; 4];
        let at = u64::from(copy.page) * 4096 + 0xff;
        copies.file.read_exact_at(&mut there, at).unwrap();
        assert_eq!(there, [HIDDEN, 0x90, 0xc3, HIDDEN]);
    }
}
