//! `berth network ...`: asks the daemon and prints.

use berth_api::v1::network::{CreateNetwork, Network};
use berth_api::v1::routes::{self, PREFIX};
use hyper::Method;

use crate::args::network::{NetworkCommand, NetworkCreateArgs};
use crate::client::Client;
use crate::exit::{CliError, ExitCode};
use crate::vm::{NOTHING, each, print, print_json, print_list};

type Done = Result<ExitCode, CliError>;

/// Does what a command says.
///
/// # Errors
/// [`CliError`].
pub fn run(client: &Client, command: &NetworkCommand) -> Done {
    match command {
        NetworkCommand::Create(create) => make(client, create),
        NetworkCommand::Ls(listing) => list(client, listing.json),
        NetworkCommand::Inspect(names) => {
            let found: Result<Vec<Network>, _> = names
                .names
                .iter()
                .map(|name| client.call(&Method::GET, &routes::network(name), NOTHING))
                .collect();
            print_json(&found?)
        }
        NetworkCommand::Rm(names) => each(&names.names, |name| {
            client.call::<()>(&Method::DELETE, &routes::network(name), NOTHING)
        }),
    }
}

fn make(client: &Client, args: &NetworkCreateArgs) -> Done {
    let request = CreateNetwork {
        name: args.name.clone(),
        subnet: args.subnet.clone(),
        internal: args.internal,
    };
    let path = format!("{PREFIX}/networks");
    let made: Network = client.call(&Method::POST, &path, Some(&request))?;
    print(&format!("{}\n", made.name))
}

fn list(client: &Client, json: bool) -> Done {
    let networks: Vec<Network> =
        client.call(&Method::GET, &format!("{PREFIX}/networks"), NOTHING)?;
    let columns = ["NAME", "SUBNET", "GATEWAY", "BRIDGE", "KIND", "MEMBERS"];
    print_list(&networks, json, &columns, |network| {
        vec![
            network.name.clone(),
            network.subnet.clone(),
            network.gateway.to_string(),
            network.bridge.clone(),
            if network.internal { "internal" } else { "nat" }.to_owned(),
            network.members.len().to_string(),
        ]
    })
}
