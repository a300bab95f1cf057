//! `berth vm run` of an image: a machine of the daemon's that is there as long as this program.

use std::io::{self, BufRead, BufReader, Chain, Cursor, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use berth_api::v1::machine::{Machine, MachineConfig};
use berth_api::v1::routes::{self, PREFIX, UPGRADE_CONSOLE, UPGRADE_RUN};
use berth_api::v1::run::{Ended, RunMachine, Shell};
use berth_vmm::console::SignalWatch;
use hyper::Method;
use serde::de::DeserializeOwned;

use crate::args::RunArgs;
use crate::client::{Client, ClientError};
use crate::command::{self, AGENT_WAIT};
use crate::exit::{CliError, ExitCode};
use crate::machine::{MachineError, POWER_OFF_WAIT, complaint};
use crate::plan::first_command;
use crate::terminal;
use crate::vm::{Done, Kept, given_disk, made_of, show_console};

/// How much of what the guest printed before the console is connected is shown.
const BACKLOG: u32 = 1 << 20;
/// A line about a machine.
const LINE_MAX: u64 = 1 << 20;
/// How soon the end of a machine is told whose guest does not answer any more.
const END_WAIT: Duration = Duration::from_secs(2);

/// Runs a machine until its guest powers off, its command has ended, or this program is told to end.
///
/// # Errors
/// [`CliError`].
pub fn run(client: &Client, args: &RunArgs) -> Done {
    let command = first_command(args);
    let config = made_of(client, &args.machine, args.image.as_deref())?;
    let shell = if command.is_some() { Shell::Never } else { Shell::Once };
    let mut running = Running::begin(client, args, config, shell)?;
    match command {
        None => running.console(client),
        Some(command) => {
            let mut guest = Kept::new(client, &running.name);
            match command::run(&mut guest, &command) {
                Ok(status) => {
                    running.power_off(client);
                    Ok(status)
                }
                Err(source) if source.is_refusal() => {
                    running.power_off(client);
                    Err(MachineError::Refused(source).into())
                }
                Err(source) => Err(match running.ended(Some(END_WAIT)) {
                    Ok(ended) => {
                        let console = complaint(&ended.console);
                        MachineError::Command { source, console }.into()
                    }
                    // It does not answer, and runs.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        MachineError::Command { source, console: String::new() }.into()
                    }
                    Err(_) => CliError::OutOfSight { name: running.name.clone() },
                }),
            }
        }
    }
}

/// A machine that runs as long as this is there.
struct Running {
    name: String,
    /// What comes, with what came before it was looked at.
    lines: BufReader<Chain<Cursor<Vec<u8>>, UnixStream>>,
}

impl Running {
    fn begin(
        client: &Client,
        args: &RunArgs,
        config: MachineConfig,
        shell: Shell,
    ) -> Result<Self, CliError> {
        let disks = args.disks.iter().map(given_disk).collect::<Result<_, _>>()?;
        let (name, terminal) = (args.name.clone(), terminal::described());
        let request = RunMachine { name, shell, terminal, config, disks };
        let path = format!("{PREFIX}/run");
        let (stream, before) =
            client.upgrade_by(&Method::POST, &path, Some(&request), UPGRADE_RUN)?;
        let lines = BufReader::new(Cursor::new(before).chain(stream));
        let mut running = Self { name: String::new(), lines };
        let reading = |error| ClientError::System("reading the daemon's answer", error);
        let machine: Machine = running.line().map_err(reading)?;
        running.name = machine.name;
        Ok(running)
    }

    fn line<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        let mut line = Vec::new();
        self.lines.by_ref().take(LINE_MAX).read_until(b'\n', &mut line)?;
        Ok(serde_json::from_slice(&line)?)
    }

    /// How it ended, if it does within that time.
    fn ended(&mut self, patience: Option<Duration>) -> io::Result<Ended> {
        self.lines.get_ref().get_ref().1.set_read_timeout(patience)?;
        self.line()
    }

    /// Shows its console until it ends.
    fn console(&mut self, client: &Client) -> Done {
        let path = routes::machine(&self.name, Some("console"));
        let path = format!("{path}?backlog={BACKLOG}");
        let left = Arc::new(AtomicBool::new(false));
        match client.upgrade(&path, UPGRADE_CONSOLE) {
            Ok((stream, before)) => {
                let (seen, told) = (stream.try_clone().map_err(CliError::Output)?, left.clone());
                // The terminal is to be as it was.
                let watch = SignalWatch::start(move |_| {
                    told.store(true, Ordering::SeqCst);
                    let _ = seen.shutdown(Shutdown::Both);
                });
                watch.map_err(MachineError::Signals)?;
                show_console(stream, &before, &left)?;
                if left.load(Ordering::SeqCst) {
                    return Err(self.failed("it was stopped"));
                }
                self.result()
            }
            // It has ended already, perhaps.
            Err(error) => match self.ended(Some(END_WAIT)) {
                Ok(ended) => {
                    let mut out = io::stdout();
                    let shown = out.write_all(ended.console.as_bytes()).and_then(|()| out.flush());
                    shown.map_err(CliError::Output)?;
                    self.status(ended)
                }
                Err(_) => Err(error.into()),
            },
        }
    }

    fn result(&mut self) -> Done {
        match self.ended(None) {
            Ok(ended) => self.status(ended),
            Err(_) => Err(CliError::OutOfSight { name: self.name.clone() }),
        }
    }

    fn status(&self, ended: Ended) -> Done {
        match ended.exit.in_order {
            true => Ok(ExitCode::Guest(ended.exit.status)),
            false => Err(self.failed(&ended.exit.reason)),
        }
    }

    fn failed(&self, reason: &str) -> CliError {
        CliError::Ended { name: self.name.clone(), reason: reason.to_owned() }
    }

    /// Lets the guest write what it has to, within a limit.
    fn power_off(&mut self, client: &Client) {
        let mut guest = Kept::new(client, &self.name);
        if command::shut_down(&mut guest, AGENT_WAIT).is_ok() {
            // How it ended does not matter any more.
            let _ = self.ended(Some(POWER_OFF_WAIT));
        }
    }
}
