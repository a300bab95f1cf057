//! The files that a kept machine boots, which may be in its folder.

use std::path::{Path, PathBuf};

/// What `initrd` of a `vm.toml` names, which may be in the machine's folder.
pub(super) fn modules_in(folder: &Path, list: &Path) -> PathBuf {
    let whole = folder.join(list);
    if list.is_absolute() || whole.exists() {
        return whole;
    }
    let list = list.to_string_lossy();
    let modules = list.split(',').filter(|module| !module.is_empty());
    let modules = modules.map(|module| folder.join(module).to_string_lossy().into_owned());
    modules.collect::<Vec<_>>().join(",").into()
}
