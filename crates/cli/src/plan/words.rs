//! Words of the kernel command line that the guest's agent reads.

use berth_api::v1::run::Terminal;

use crate::args::machine::{ShareArg, Variable};

/// A variable as the agent reads it: bytes that could mean something else are written as `%2F`.
pub(super) fn variable(variable: &Variable) -> String {
    format!("berth.env={}={}", written(&variable.name), written(&variable.value))
}

/// A shared folder as the agent reads it: its tag, how, and where it is to be mounted.
pub(super) fn share((index, share): (usize, &ShareArg)) -> String {
    let how = if share.read_only { ",ro" } else { "" };
    format!("berth.share=share{index}{how}={}", written(&share.guest))
}

fn written(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./:,+@".contains(&byte);
    let bytes = text.bytes().map(|byte| match byte {
        byte if plain(byte) => char::from(byte).to_string(),
        byte => format!("%{byte:02x}"),
    });
    bytes.collect()
}

/// What the agent is told of the terminal that its console is.
pub(super) fn terminal(terminal: &Terminal) -> Vec<String> {
    let mut words = Vec::new();
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '+');
    if let Some(term) = &terminal.term
        && !term.is_empty()
        && term.chars().all(plain)
    {
        words.push(format!("berth.term={term}"));
    }
    if terminal.rows != 0 && terminal.cols != 0 {
        words.push(format!("berth.size={}x{}", terminal.rows, terminal.cols));
    }
    words
}
