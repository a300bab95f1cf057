//! The init and agent inside a virtual machine.
//!
//! Started by the kernel as `/init` of the initramfs it brings the guest up (`boot`), moves into the
//! root disk, and then either runs a shell on the console (`shell`), or steps aside for the image's
//! own init, or waits; in each case it serves the host over vsock (`server`, `session`). Linked
//! statically, since it runs before any file system with libraries is mounted.

mod boot;
mod button;
mod cmdline;
mod copy;
mod cpus;
mod dhcp;
mod environment;
mod identity;
mod network;
mod power;
mod reaper;
mod server;
mod session;
mod shell;
mod spawn;
mod sys;
mod users;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use crate::cmdline::{CommandLine, Shell};
use crate::copy::Task;
use crate::power::Power;
use crate::reaper::Reaper;

/// Between a shell on the console and the next one.
const SHELL_PAUSE: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    // Never as process 1, whose words are the kernel's.
    if std::process::id() != 1
        && let Some(task) = Task::parse(&words)
    {
        return task.run();
    }
    let mut arguments = words.into_iter();
    match (arguments.next(), arguments.next()) {
        // For tests on the host: the same protocol on a unix socket, and no power to switch off.
        (Some(mode), Some(path)) if mode == "--serve-unix" => {
            let reaper = Reaper::start();
            match server::serve_unix(path.as_ref(), &reaper) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("berth-agent: cannot serve {}: {error}", path.display());
                    ExitCode::FAILURE
                }
            }
        }
        _ if std::process::id() == 1 => init(),
        _ => {
            eprintln!("berth-agent is the init of a virtual machine; it does nothing elsewhere");
            ExitCode::FAILURE
        }
    }
}

/// The life of process 1. Whatever fails on the way is said on the console and ends the machine:
/// with a reset, which the host reports as a failure.
fn init() -> ! {
    power::reset_on_panic();
    let error = match bring_up() {
        Ok(never) => match never {},
        Err(error) => error,
    };
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    boot::say(&format!("cannot start the guest: {text}"));
    power::reset()
}

fn bring_up() -> Result<std::convert::Infallible, Box<dyn std::error::Error>> {
    boot::mount_kernel_interfaces()?;
    boot::say("init");
    let line = CommandLine::read()?;
    environment::set(line.env.clone());
    boot::load_modules(!line.shares.is_empty())?;
    if let Some(device) = &line.root {
        boot::enter_root(device, line.writable)?;
    }
    boot::finish_mounts(line.root.is_some() && line.writable);
    boot::mount_shares(&line.shares)?;
    if let Some(name) = &line.hostname {
        boot::set_hostname(name);
    }
    if let Some(program) = &line.init {
        power::hand_over(program)?;
    }
    let reaper = Reaper::start();
    let power = Arc::new(Power::new(Arc::clone(&reaper)));
    if line.init.is_none() {
        network::bring_up();
    }
    if line.init.is_none() {
        button::watch(&power);
    }
    let serving = server::serve_vsock(line.port, &reaper, &power);
    // The console of an image with an init of its own is that one's.
    if line.shell != Shell::None && line.init.is_none() {
        if let Err(error) = serving {
            boot::say(&format!("no agent on vsock port {}: {error}", line.port));
        }
        loop {
            shell::run(&line, &reaper)?;
            if line.shell == Shell::Once {
                power.off();
            }
            // One that ends at once does not take the whole processor.
            std::thread::sleep(SHELL_PAUSE);
        }
    }
    serving?;
    loop {
        std::thread::park();
    }
}
