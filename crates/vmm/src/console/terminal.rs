//! The terminal in raw mode, and the signals that end the machine.

use std::io;

use vmm_sys_util::signal::block_signal;

/// Keeps the terminal of standard input raw; dropping it restores what was.
pub struct RawTerminal {
    saved: libc::termios,
}

impl RawTerminal {
    /// Makes the terminal raw. `None`: standard input is no terminal.
    ///
    /// # Errors
    /// The terminal cannot be set.
    pub fn enter() -> io::Result<Option<Self>> {
        // SAFETY: isatty only looks at the descriptor.
        if unsafe { libc::isatty(libc::STDIN_FILENO) } != 1 {
            return Ok(None);
        }
        let mut saved = std::mem::MaybeUninit::<libc::termios>::uninit();
        // SAFETY: tcgetattr fills the structure it is given.
        if unsafe { libc::tcgetattr(libc::STDIN_FILENO, saved.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: tcgetattr succeeded, so the structure is initialized.
        let saved = unsafe { saved.assume_init() };
        let mut raw = saved;
        // SAFETY: the structure is valid; cfmakeraw only changes its fields.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // The guest sends its own carriage returns, but messages of this program do not.
        raw.c_oflag |= saved.c_oflag & (libc::OPOST | libc::ONLCR);
        set(&raw)?;
        Ok(Some(Self { saved }))
    }
}

fn set(termios: &libc::termios) -> io::Result<()> {
    loop {
        // SAFETY: the structure is valid and only read.
        if unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, termios) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Err(error) = set(&self.saved) {
            tracing::warn!(%error, "the terminal could not be restored; `reset` does it");
        }
    }
}

/// Turns SIGINT, SIGTERM and SIGHUP into a call.
///
/// Must be made before any other thread is started, so that all threads have the signals blocked.
/// The signals are not unblocked again: the program is about to end when one comes. A program that
/// is started in between inherits the blocked signals unless it clears its mask.
pub struct SignalWatch;

impl SignalWatch {
    /// Starts to watch; `on_signal` gets the signal's number, on a thread of its own.
    ///
    /// # Errors
    /// The system refused to block the signals, or the thread.
    pub fn start(mut on_signal: impl FnMut(i32) + Send + 'static) -> io::Result<()> {
        // SAFETY: a zeroed set is a valid place for sigemptyset to fill.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: the set is a live local.
        unsafe { libc::sigemptyset(&raw mut set) };
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            block_signal(signal).map_err(|e| io::Error::other(e.to_string()))?;
            // SAFETY: the set was initialized above; the signal numbers are valid.
            unsafe { libc::sigaddset(&raw mut set, signal) };
        }
        // Not a descriptor for signals: whoever reads that is woken up by every signal that any thread
        // gets, and vCPUs get many.
        let thread = std::thread::Builder::new().name("signals".into());
        thread.spawn(move || {
            loop {
                let mut signal = 0;
                // SAFETY: the set is initialized, and the variable lives during the call.
                match unsafe { libc::sigwait(&raw const set, &raw mut signal) } {
                    0 => on_signal(signal),
                    libc::EINTR => {}
                    _ => return,
                }
            }
        })?;
        Ok(())
    }
}
