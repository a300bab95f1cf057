//! The words about networks and published ports.

use clap::Subcommand;

use crate::args::Listing;

const CREATE_EXAMPLES: &str = "\
Examples:
  berth network create lab
  berth network create --subnet 10.20.0.0/24 --internal db
  berth vm create --net lab -p 8080:80 web debian";

/// Commands for networks.
#[derive(Debug, Subcommand)]
pub enum NetworkCommand {
    /// Make a network: a bridge of this host, with addresses and names for the machines in it
    Create(NetworkCreateArgs),
    /// List the networks
    #[command(visible_alias = "list")]
    Ls(Listing),
    /// Print all that is known of networks, as JSON
    Inspect(NetworkNames),
    /// Remove networks that no machine is in
    Rm(NetworkNames),
}

/// `berth network create`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = CREATE_EXAMPLES)]
pub struct NetworkCreateArgs {
    /// Its addresses [default: some that this host has no other way to]
    #[arg(long, value_name = "CIDR")]
    pub subnet: Option<String>,
    /// Machines in it reach each other, and nothing else
    #[arg(long)]
    pub internal: bool,
    /// Its name, which names in it end in: letters in lower case, digits and `-`
    pub name: String,
}

/// Commands that do the same to several networks.
#[derive(Clone, Debug, clap::Args)]
pub struct NetworkNames {
    /// The networks' names
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// `berth vm port`.
#[derive(Clone, Debug, clap::Args)]
pub struct PortArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The machine's name
    pub name: String,
}
