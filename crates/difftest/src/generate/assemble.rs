//! From items with labels to bytes.

use iced_x86::{Encoder, Instruction, OpKind};

use crate::case::Span;

/// A place in the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label(pub usize);

/// An instruction before encoding.
#[derive(Clone, Debug, Default)]
pub struct Item {
    /// The instruction.
    pub ins: Instruction,
    /// Prefix bytes put in front.
    pub prefixes: Vec<u8>,
    /// Put a REX prefix without meaning before the opcode, when there is none.
    pub rex: bool,
    /// Target of a near branch.
    pub branch: Option<Label>,
    /// The immediate is the address of this label.
    pub immediate: Option<Label>,
    /// The memory operand is RIP-relative (or absolute in 32-bit code) to this label plus an offset.
    pub memory: Option<(Label, i64)>,
}

impl From<Instruction> for Item {
    fn from(ins: Instruction) -> Self {
        Self { ins, ..Self::default() }
    }
}

/// Encodes `items` at `entry`. `labels` says before which item each label stands. Returns the
/// code, the boundaries, and the addresses of the labels.
pub fn assemble(
    bitness: u32,
    entry: u64,
    items: &[Item],
    labels: &[usize],
) -> Option<(Vec<u8>, Vec<Span>, Vec<u64>)> {
    let mut addresses = vec![entry; labels.len()];
    // Lengths do not depend on where labels are, so the second pass is final.
    for _ in 0..2 {
        let mut code = Vec::new();
        let mut spans = Vec::new();
        for item in items {
            let start = code.len();
            code.extend(encode(bitness, entry + start as u64, item, &addresses)?);
            spans.push(Span { start: start as u16, len: (code.len() - start) as u8 });
        }
        let next: Vec<u64> = labels
            .iter()
            .map(|i| entry + spans.get(*i).map_or(code.len() as u64, |s| u64::from(s.start)))
            .collect();
        if next == addresses {
            return Some((code, spans, addresses));
        }
        addresses = next;
    }
    let mut code = Vec::new();
    let mut spans = Vec::new();
    for item in items {
        let start = code.len();
        code.extend(encode(bitness, entry + start as u64, item, &addresses)?);
        spans.push(Span { start: start as u16, len: (code.len() - start) as u8 });
    }
    Some((code, spans, addresses))
}

/// Whether a byte is a legacy prefix.
pub fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65)
}

fn encode(bitness: u32, at: u64, item: &Item, labels: &[u64]) -> Option<Vec<u8>> {
    let mut ins = item.ins;
    if let Some(Label(l)) = item.branch {
        ins.set_near_branch64(labels[l]);
    }
    if let Some(Label(l)) = item.immediate {
        match ins.op1_kind() {
            OpKind::Immediate64 => ins.set_immediate64(labels[l]),
            _ => ins.set_immediate32(labels[l] as u32),
        }
    }
    if let Some((Label(l), delta)) = item.memory {
        let address = labels[l].wrapping_add(delta as u64);
        ins.set_memory_displacement64(address);
    }
    let at = at + item.prefixes.len() as u64;
    let mut bytes = bytes_of(bitness, &ins, at)?;
    let opcode = bytes.iter().position(|b| !is_prefix(*b)).unwrap_or(0);
    let bare =
        bitness == 64 && !matches!(bytes.get(opcode), Some(0x40..=0x4f | 0xc4 | 0xc5) | None);
    if item.rex && bare {
        // Once more, one byte later, so that relative operands count the REX prefix.
        bytes = bytes_of(bitness, &ins, at + 1)?;
        bytes.insert(opcode, 0x40);
    }
    let mut whole = item.prefixes.clone();
    whole.extend(bytes);
    (whole.len() <= 15).then_some(whole)
}

fn bytes_of(bitness: u32, ins: &Instruction, at: u64) -> Option<Vec<u8>> {
    let mut encoder = Encoder::new(bitness);
    encoder.encode(ins, at).ok()?;
    Some(encoder.take_buffer())
}
