//! `berth daemon`: from its words to the daemon's own crate.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use berth_daemon::server::{Config, Tcp};
use berth_daemon::vmm::Program;
use berth_vmm::clock::measure_tsc_hz;

use crate::client::{Place, TlsGiven};
use crate::exit::{CliError, ExitCode};

/// How long the time-stamp counter is looked at.
const TSC_TIME: Duration = Duration::from_millis(200);

/// Runs a daemon until a signal ends it.
///
/// # Errors
/// [`CliError`].
pub fn run(
    root: &Path,
    place: Place,
    listen: Option<&str>,
    tls: &TlsGiven,
    detached: bool,
) -> Result<ExitCode, CliError> {
    let Place::Unix(socket) = place else {
        return Err(CliError::Usage(format!(
            "a daemon listens on a unix socket; `--listen {place}` lets it listen there too"
        )));
    };
    let tcp = listen.map(|listen| tcp(listen, tls)).transpose()?;
    if detached {
        // The terminal of whoever needed it first does not end it.
        let _ = rustix::process::setsid();
    }
    // What it makes, and what its machines make, is its user's alone.
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    let root = std::path::absolute(root).map_err(CliError::Output)?;
    let path = std::env::current_exe().map_err(CliError::Output)?;
    let program = Program { path, tsc_hz: Arc::default(), zygote: Arc::default() };
    let tsc_hz = Arc::clone(&program.tsc_hz);
    // Machines that are started before that is known find it out themselves.
    let _ = std::thread::Builder::new()
        .name("tsc".into())
        .spawn(move || tsc_hz.set(measure_tsc_hz(TSC_TIME)));
    let config = Config { root, socket, program, tcp };
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(2).enable_all().build().map_err(CliError::Output)?;
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate()).map_err(CliError::Output)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(CliError::Output)?;
        let over = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        berth_daemon::server::serve(&config, over).await?;
        Ok(ExitCode::Success)
    })
}

fn tcp(listen: &str, tls: &TlsGiven) -> Result<Tcp, CliError> {
    let address = listen.strip_prefix("tcp://").filter(|address| !address.contains('/'));
    let address = address.filter(|address| {
        address
            .rsplit_once(':')
            .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
    });
    let Some(address) = address else {
        return Err(CliError::Usage(format!(
            "`{listen}` is nothing to listen at; `tcp://ADDRESS:PORT` is, as in tcp://0.0.0.0:4343"
        )));
    };
    let tls = tls.all().map_err(|missing| {
        CliError::Usage(format!(
            "--listen {listen} needs --tls-ca, --tls-cert and --tls-key, since whoever connects could \
             do all that this user can; {missing} is missing"
        ))
    })?;
    Ok(Tcp { address: address.to_owned(), tls })
}
