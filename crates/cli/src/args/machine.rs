//! What a machine is made of: the options that machines which are kept and others have in common, and
//! how one that is kept is changed.

use std::path::PathBuf;
use std::str::FromStr;

use berth_api::processors::Processors;
use berth_api::size::Size;
use berth_api::v1::machine::Cpu;
use berth_api::v1::network::{Port, is_network_name};
use clap::ValueEnum;

/// What `run` and `create` have in common.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct MachineArgs {
    /// Virtual processors, 1 to 16
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub cpus: u8,
    /// Memory: bytes, or with K, M, G or T
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    pub memory: Size,
    /// What runs the guest's instructions
    #[arg(long, value_enum, value_name = "HOW", default_value_t = Accel::Auto)]
    pub accel: Accel,
    /// The processor that the guest sees: `host`, what this host has; or `x86-64`, `x86-64-v2` or
    /// `x86-64-v3`, so that snapshots of it go on on any host of that level and of the same vendor
    #[arg(long, value_name = "CPU", default_value_t = Cpu::Host)]
    pub cpu: Cpu,
    /// A kernel: bzImage, PVH ELF or Multiboot, told apart by looking [default: the image's]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// An initial RAM disk; or Multiboot modules, as `FILE ARGS,FILE ARGS`
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Words added to the kernel command line; a bzImage gets panic=-1 too, unless they say panic=N
    #[arg(long, value_name = "WORDS", default_value = "", allow_hyphen_values = true)]
    pub append: String,
    /// `user` (through passt), `tap=INTERFACE`, `none`, or the name of a network (`berth network`), which
    /// kept machines can be in [default: user with an image, else none]
    #[arg(long, value_name = "NET")]
    pub net: Option<NetArg>,
    /// A port of this host that leads to the guest, at all of the host's addresses or at one, an IPv6
    /// address in brackets. Needs `--net user` or a network. May be repeated
    #[arg(long, short, value_name = "[HOSTIP:]HOSTPORT:GUESTPORT[/tcp|udp]")]
    pub publish: Vec<Port>,
    /// Gives the guest port 0xf4: writing V ends the machine with status V*2+1
    #[arg(long)]
    pub debug_exit: bool,
    /// A variable in the environment of commands in the guest and of its console's shell. All users in
    /// the guest can read it, and all together have about 1,900 bytes. May be repeated
    #[arg(long, short, value_name = "NAME=VALUE", requires = "image")]
    pub env: Vec<Variable>,
    /// A folder of the host that the guest has at GUESTDIR, an absolute path that is made where it is
    /// missing; with `:ro` the guest cannot change anything in it. Without an image GUESTDIR is a tag by
    /// which the guest can mount it (`mount -t virtiofs TAG DIR`). May be repeated
    #[arg(long = "share", value_name = "HOSTDIR:GUESTDIR[:ro]")]
    pub shares: Vec<ShareArg>,
}

/// `berth vm set`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = SET_EXAMPLES)]
pub struct SetArgs {
    /// Virtual processors, 1 to 16
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub cpus: Option<u8>,
    /// Memory: bytes, or with K, M, G or T
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<Size>,
    /// Processor time that the machine may have at most, as 1.5, or `none`
    #[arg(long, value_name = "N", value_parser = limit::<Processors>)]
    pub cpu_limit: Option<Processors>,
    /// Memory that the machine's process may have at most, or `none`
    #[arg(long, value_name = "SIZE", value_parser = limit::<Size>)]
    pub memory_limit: Option<Size>,
    /// What runs the guest's instructions
    #[arg(long, value_enum, value_name = "HOW")]
    pub accel: Option<Accel>,
    /// The processor that the guest sees: `host`, `x86-64`, `x86-64-v2` or `x86-64-v3`
    #[arg(long, value_name = "CPU")]
    pub cpu: Option<Cpu>,
    /// Words added to the kernel command line, instead of those before
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// `user` (through passt), `tap=INTERFACE`, `none`, or the name of a network
    #[arg(long, value_name = "NET")]
    pub net: Option<NetArg>,
    /// A port of this host that leads to the guest, instead of those before. May be repeated
    #[arg(long, short, value_name = "[HOSTIP:]HOSTPORT:GUESTPORT[/tcp|udp]")]
    pub publish: Vec<Port>,
    /// No port of this host leads to the guest any more
    #[arg(long, conflicts_with = "publish")]
    pub publish_none: bool,
    /// Whether the guest has port 0xf4
    #[arg(long, value_name = "true|false")]
    pub debug_exit: Option<bool>,
    /// A variable of the environment, as for `create`. May be repeated
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub env: Vec<Variable>,
    /// A variable that is to be there no more. May be repeated
    #[arg(long, value_name = "NAME")]
    pub unset_env: Vec<String>,
    /// The machine's name
    pub name: String,
}

/// A limit, or the zero that is none.
fn limit<T: FromStr<Err = String> + Default + PartialEq>(text: &str) -> Result<T, String> {
    match text {
        "none" => Ok(T::default()),
        _ => match text.parse::<T>()? {
            zero if zero == T::default() => Err("nothing is no limit; `none` is".into()),
            limit => Ok(limit),
        },
    }
}

const SET_EXAMPLES: &str = "\
A machine that runs is changed at once in its limits, and in its processors and its memory, up to what it
was started with, if its guest has Berth's agent and a driver for a memory balloon. All else is changed when it is started
again (`berth vm restart`), and the command says so. One that is suspended keeps what it was stored with:
only --accel, --append, --env, --unset-env and limits are possible.

Examples:
  berth vm set --cpus 4 --memory 2G web
  berth vm set --cpu-limit 1.5 --memory-limit none web
  berth vm set --env MODE=test --unset-env DEBUG web && berth vm restart web
  berth vm set --publish 8080:80 --publish 127.0.0.1:5353:53/udp web";

/// `NAME=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
}

impl Variable {
    /// Name and value.
    #[must_use]
    pub fn into_pair(self) -> (String, String) {
        (self.name, self.value)
    }
}

impl FromStr for Variable {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some((name, value)) if !name.is_empty() => {
                Ok(Self { name: name.to_owned(), value: value.to_owned() })
            }
            _ => Err("no variable; NAME=VALUE is one".into()),
        }
    }
}

/// `HOSTDIR:GUESTDIR[:ro]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareArg {
    /// A folder of the host.
    pub host: PathBuf,
    /// Where the guest has it, or its tag.
    pub guest: String,
    /// The guest cannot write.
    pub read_only: bool,
}

impl FromStr for ShareArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (both, read_only) = match text.strip_suffix(":ro") {
            Some(both) => (both, true),
            None => (text, false),
        };
        // The host's path may have colons, the guest's not.
        match both.rsplit_once(':') {
            Some((host, guest)) if !host.is_empty() && !guest.is_empty() => {
                Ok(Self { host: host.into(), guest: guest.to_owned(), read_only })
            }
            _ => Err("a shared folder is HOSTDIR:GUESTDIR or HOSTDIR:GUESTDIR:ro".into()),
        }
    }
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// The fastest that really works here
    #[default]
    Auto,
    /// Berth's own translator; works everywhere
    Translate,
    /// The kernel's KVM
    Kvm,
}

/// The machine's network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetArg {
    /// Through passt, without privileges.
    User,
    /// On this tap interface.
    Tap(String),
    /// In this network of the daemon's.
    Network(String),
    /// No network card.
    None,
}

impl FromStr for NetArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // IFNAMSIZ less its zero byte.
        const INTERFACE_BYTES_MAX: usize = 15;
        match text.split_once('=') {
            None if text == "user" => Ok(Self::User),
            None if text == "none" => Ok(Self::None),
            Some(("tap", name)) if !name.is_empty() && name.len() <= INTERFACE_BYTES_MAX => {
                Ok(Self::Tap(name.to_owned()))
            }
            None if is_network_name(text) => Ok(Self::Network(text.to_owned())),
            _ => Err("expected `user`, `tap=INTERFACE`, `none` or the name of a network".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ShareArg;

    #[test]
    fn shares_are_told_apart_from_their_places() {
        let of = |text: &str| {
            let share = text.parse::<ShareArg>().unwrap();
            (share.host.display().to_string(), share.guest, share.read_only)
        };
        assert_eq!(of("a:/b"), ("a".into(), "/b".into(), false));
        assert_eq!(of("/x:y/z:/b c:ro"), ("/x:y/z".into(), "/b c".into(), true));
        assert_eq!(of(".:tag"), (".".into(), "tag".into(), false));
        for bad in ["", "a", "a:", ":/b", "a:ro", ":ro"] {
            assert!(bad.parse::<ShareArg>().is_err(), "{bad}");
        }
    }
}
