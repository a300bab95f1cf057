//! The words about networks and published ports.

/// `berth vm port`.
#[derive(Clone, Debug, clap::Args)]
pub struct PortArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The machine's name
    pub name: String,
}
