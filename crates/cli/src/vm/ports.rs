//! `berth vm port`.

use berth_api::v1::machine::Machine;
use berth_api::v1::routes;
use hyper::Method;

use crate::args::network::PortArgs;
use crate::client::Client;
use crate::exit::{CliError, ExitCode};
use crate::vm::{NOTHING, print, print_json};

/// A line for each port, the guest's first, as `docker port` has them.
///
/// # Errors
/// [`CliError`].
pub fn list(client: &Client, args: &PortArgs) -> Result<ExitCode, CliError> {
    let machine: Machine =
        client.call(&Method::GET, &routes::machine(&args.name, None), NOTHING)?;
    let ports = machine.config.ports;
    if args.json {
        return print_json(&ports);
    }
    let line = |port: &berth_api::v1::network::Port| {
        format!("{}/{} -> {}\n", port.guest, port.protocol.as_str(), port.host_side())
    };
    print(&ports.iter().map(line).collect::<String>())
}
