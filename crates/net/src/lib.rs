//! Networks of a host. Each is a bridge with a subnet of IPv4 addresses, of which the host has the first;
//! its members are interfaces in the bridge, with names and addresses that stay. What is a member, a
//! virtual machine or a container, is not known here.
//!
//! ```text
//!             outside ◄──► nftables: masquerade, published ports, isolation ◄──► bridge ◄──► members
//!   host's own loopback ──► proxy of a published port ──────────────────────────►  │
//!                                              DHCP, DNS on the gateway's address ─┘
//! ```
//!
//! [`networks`] has the operations, [`store`] their files, [`rules`] what is to be in nftables, as data;
//! `link`, `tap`, `nft` and `sysctl` change the host; [`dhcp`], [`dns`] and `proxy` answer packets. All
//! that is on the host can be made again from the files: an operation states what is to be, and what is
//! there is brought to that.

pub mod dhcp;
pub mod dns;
pub mod error;
mod limits;
mod link;
mod name;
pub mod networks;
mod nft;
pub mod port;
mod proxy;
pub mod relay;
pub mod rules;
mod serve;
pub mod store;
pub mod subnet;
mod sysctl;
mod tap;
pub mod view;
