//! `berth vm snapshot`, `restore`, `clone` and what belongs to them.

use berth_api::v1::machine::Machine;
use berth_api::v1::routes;
use berth_api::v1::snapshot::{CloneMachine, RestoreSnapshot, Snapshot, TakeSnapshot};
use hyper::Method;

use super::{Done, NOTHING, each, print, print_json};
use crate::args::snapshots::{CloneArgs, RestoreArgs, SnapshotArgs, SnapshotRmArgs, SnapshotsArgs};
use crate::client::Client;
use crate::table;

/// `berth vm snapshot`.
///
/// # Errors
/// [`crate::exit::CliError`].
pub fn take(client: &Client, args: &SnapshotArgs) -> Done {
    let request = TakeSnapshot { tag: args.tag.clone(), disk_only: args.disk_only };
    let path = routes::machine(&args.name, Some("snapshots"));
    let taken: Snapshot = client.call(&Method::POST, &path, Some(&request))?;
    print(&format!("{}\n", taken.tag))
}

/// `berth vm snapshots`.
///
/// # Errors
/// [`crate::exit::CliError`].
pub fn list(client: &Client, args: &SnapshotsArgs) -> Done {
    let path = routes::machine(&args.name, Some("snapshots"));
    let all: Vec<Snapshot> = client.call(&Method::GET, &path, NOTHING)?;
    if args.json {
        return print_json(&all);
    }
    let rows = tree(&all).into_iter().map(|(depth, one)| {
        let indent = "  ".repeat(depth);
        let now = if one.current { " *" } else { "" };
        vec![
            format!("{indent}{}{now}", one.tag),
            one.created.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
            if one.memory { "memory, disks" } else { "disks" }.to_owned(),
            one.pause_ms.map_or_else(|| "-".into(), |ms| format!("{ms:.1} ms")),
        ]
    });
    print(&(table::plain(&["SNAPSHOT", "TAKEN", "HOLDS", "PAUSE"], rows.collect()) + "\n"))
}

/// Each behind the one it descends from, with how deep it is. The oldest come first.
fn tree(all: &[Snapshot]) -> Vec<(usize, &Snapshot)> {
    let mut shown = Vec::new();
    // The last is the next to be shown.
    let children = |parent: Option<&str>| -> Vec<&Snapshot> {
        all.iter().rev().filter(|one| one.parent.as_deref() == parent).collect()
    };
    let mut left: Vec<_> = children(None).into_iter().map(|one| (0, one)).collect();
    while let Some((depth, one)) = left.pop() {
        shown.push((depth, one));
        // Whoever answers nonsense does not keep us here.
        if shown.len() < all.len() {
            left.extend(children(Some(&one.tag)).into_iter().map(|child| (depth + 1, child)));
        }
    }
    shown
}

/// `berth vm restore`.
///
/// # Errors
/// [`crate::exit::CliError`].
pub fn restore(client: &Client, args: &RestoreArgs) -> Done {
    let request = RestoreSnapshot { tag: args.tag.clone(), force: args.force };
    let path = routes::machine(&args.name, Some("restore"));
    let machine: Machine = client.call(&Method::POST, &path, Some(&request))?;
    print(&format!("{}\n", machine.name))
}

/// `berth vm snapshot-rm`.
///
/// # Errors
/// [`crate::exit::CliError`].
pub fn remove(client: &Client, args: &SnapshotRmArgs) -> Done {
    each(&args.tags, |tag| {
        let path = routes::snapshot(&args.name, tag);
        client.call::<()>(&Method::DELETE, &path, NOTHING)
    })
}

/// `berth vm clone`.
///
/// # Errors
/// [`crate::exit::CliError`].
pub fn clone(client: &Client, args: &CloneArgs) -> Done {
    let request = CloneMachine {
        name: args.new.clone(),
        count: args.count,
        running: args.running,
        tag: args.tag.clone(),
    };
    let path = routes::machine(&args.name, Some("clone"));
    let made: Vec<Machine> = client.call(&Method::POST, &path, Some(&request))?;
    print(&made.iter().map(|machine| format!("{}\n", machine.name)).collect::<String>())
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_tree_is_shown_in_order() {
        let one = |tag: &str, parent: Option<&str>| Snapshot {
            tag: tag.into(),
            id: Uuid::nil(),
            created: Timestamp::UNIX_EPOCH,
            parent: parent.map(Into::into),
            current: false,
            memory: false,
            pause_ms: None,
        };
        let all = [one("a", None), one("b", Some("a")), one("c", None), one("d", Some("a"))];
        let shown: Vec<_> = tree(&all).iter().map(|(depth, one)| (*depth, &*one.tag)).collect();
        assert_eq!(shown, [(0, "a"), (1, "b"), (1, "d"), (0, "c")]);
    }
}
