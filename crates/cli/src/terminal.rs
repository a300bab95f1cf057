//! The user's terminal while a command of the guest has it.

use std::io;

use berth_api::agent::message::{Exec, TerminalSize};
use berth_api::v1::run::Terminal;
use rustix::stdio::{stdin, stdout};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// Of a terminal that does not know its size, as behind a serial line or in `script`.
const SIZE_DEFAULT: TerminalSize = TerminalSize { rows: 24, cols: 80 };

/// Whether a person sits at both ends.
#[must_use]
pub fn is_interactive() -> bool {
    isatty(stdin()) && isatty(stdout())
}

/// The terminal's size, when it knows one.
#[must_use]
pub fn size() -> Option<TerminalSize> {
    let size = tcgetwinsize(stdout()).ok()?;
    (size.ws_row > 0 && size.ws_col > 0)
        .then_some(TerminalSize { rows: size.ws_row, cols: size.ws_col })
}

/// Gives a command of the guest this terminal, if a person sits at both ends.
pub fn give(exec: &mut Exec) {
    if is_interactive() {
        exec.tty = Some(size().unwrap_or(SIZE_DEFAULT));
        exec.env.extend(std::env::var("TERM").ok().map(|term| ("TERM".into(), term)));
    }
}

/// What is told of the terminal to the console of a machine; `None` unless a person sits at both ends.
#[must_use]
pub fn described() -> Option<Terminal> {
    let size = size().unwrap_or(TerminalSize { rows: 0, cols: 0 });
    let term = std::env::var("TERM").ok();
    is_interactive().then_some(Terminal { term, rows: size.rows, cols: size.cols })
}

/// A terminal that passes every key on. Restored when dropped.
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Makes standard input raw.
    ///
    /// # Errors
    /// The terminal's.
    pub fn enter() -> io::Result<Self> {
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        Ok(Self { before })
    }

    /// What the terminal was before; for a thread that has to end the program.
    #[must_use]
    pub fn before(&self) -> Termios {
        self.before.clone()
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore(&self.before);
    }
}

/// Puts the terminal back.
pub fn restore(before: &Termios) {
    // A terminal that is gone needs nothing put back.
    let _ = tcsetattr(stdin(), OptionalActions::Now, before);
}
