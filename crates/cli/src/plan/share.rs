//! The folders that a machine shares with its host.

use std::fs;
use std::io;

use berth_api::v1::machine::{self as api, check_shares};
use berth_vmm::virtio::fs::device::FolderShare;

use crate::args::machine::ShareArg;
use crate::plan::PlanError;

/// What a machine is given: folders that are there, with the tags by which the guest mounts them.
/// Links in the path of a folder are followed once: not when a machine that is `kept` is started.
pub(super) fn checked(
    args: &[ShareArg],
    has_image: bool,
    kept: bool,
) -> Result<Vec<FolderShare>, PlanError> {
    let role = "a shared folder";
    let mut shares = Vec::new();
    for arg in args {
        let path = arg.host.clone();
        let failed = |source: io::Error| PlanError::File { role, path: path.clone(), source };
        let host = fs::canonicalize(&arg.host).map_err(failed)?;
        if kept && host != arg.host {
            let reason = format!(
                "a link leads from there to {} now; if that is meant, name it in vm.toml",
                host.display()
            );
            return Err(PlanError::Unfit { role, path, reason });
        }
        if !fs::metadata(&host).map_err(failed)?.is_dir() {
            let reason = "it is no folder; share the one that it is in".to_owned();
            return Err(PlanError::Unfit { role, path, reason });
        }
        let (guest, read_only) = (arg.guest.clone(), arg.read_only);
        shares.push(api::Share { host, guest, read_only });
    }
    check_shares(&shares, has_image).map_err(PlanError::Usage)?;
    let device = |(index, share): (usize, api::Share)| FolderShare {
        tag: share.tag(index, has_image),
        path: share.host,
        read_only: share.read_only,
    };
    Ok(shares.into_iter().enumerate().map(device).collect())
}

/// The words that stand for what a kept machine has.
pub(super) fn kept(share: &api::Share) -> ShareArg {
    let api::Share { host, guest, read_only } = share.clone();
    ShareArg { host, guest, read_only }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_shared_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        fs::write(at("file"), "").unwrap();
        fs::create_dir(at("folder:1")).unwrap();
        let check = |text: String| checked(&[text.parse().unwrap()], true, false);
        let share = check(format!("{}:/data:ro", at("folder:1"))).unwrap().remove(0);
        assert_eq!((share.tag.as_str(), share.read_only), ("share0", true));
        for (text, parts) in [
            (format!("{}:/d", at("nowhere")), ["nowhere", "a shared folder"]),
            (format!("{}:/d", at("file")), ["file", "no folder"]),
            (format!("{}:data", at("folder:1")), ["data", "absolute"]),
        ] {
            let error = check(text).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
        let tagged = checked(&[format!("{}:data", at("folder:1")).parse().unwrap()], false, false);
        assert_eq!(tagged.unwrap().remove(0).tag, "data");
        std::os::unix::fs::symlink(at("folder:1"), at("link")).unwrap();
        let link = [format!("{}:/data", at("link")).parse().unwrap()];
        let share = checked(&link, true, false).unwrap().remove(0);
        assert_eq!(share.path, dir.path().canonicalize().unwrap().join("folder:1"));
        let error = checked(&link, true, true).unwrap_err().to_string();
        assert!(error.contains("a link leads from there"), "{error}");
    }
}
