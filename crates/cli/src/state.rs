//! Where Berth keeps things.

use std::path::{Path, PathBuf};

use crate::exit::CliError;

/// The state directory: as given, `/var/lib/berth` for root, else the user's data directory.
///
/// # Errors
/// [`CliError::NoHome`] when a user has no home directory either.
pub fn directory(given: Option<&Path>) -> Result<PathBuf, CliError> {
    let is_root = rustix::process::geteuid().is_root();
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    choose(given, is_root, variable("XDG_DATA_HOME"), variable("HOME")).ok_or(CliError::NoHome)
}

fn choose(
    given: Option<&Path>,
    is_root: bool,
    data_home: Option<PathBuf>,
    home: Option<PathBuf>,
) -> Option<PathBuf> {
    if let Some(given) = given {
        return Some(given.to_owned());
    }
    if is_root {
        return Some("/var/lib/berth".into());
    }
    // The XDG rules: a relative path counts as unset.
    let data_home = data_home.filter(|path| path.is_absolute());
    let default = || home.filter(|path| path.is_absolute()).map(|home| home.join(".local/share"));
    Some(data_home.or_else(default)?.join("berth"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_applies_is_taken() {
        let path = |text: &str| Some(PathBuf::from(text));
        let given = Path::new("/g");
        assert_eq!(choose(Some(given), true, path("/x"), path("/h")), path("/g"));
        assert_eq!(choose(None, true, path("/x"), path("/h")), path("/var/lib/berth"));
        assert_eq!(choose(None, false, path("/x"), path("/h")), path("/x/berth"));
        assert_eq!(choose(None, false, path("x"), path("/h")), path("/h/.local/share/berth"));
        assert_eq!(choose(None, false, None, None), None);
    }
}
