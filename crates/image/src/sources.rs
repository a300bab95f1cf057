//! The package sources the host itself uses for a Debian suite, so that an image comes from the same
//! mirror (`/etc/apt/sources.list` and `sources.list.d`, in both of apt's formats).

use std::fs;
use std::path::Path;

const DEFAULT_MIRROR: &str = "http://deb.debian.org/debian";
const DEFAULT_SECURITY: &str = "http://deb.debian.org/debian-security";

/// One source, as a line of `sources.list`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Source {
    uri: String,
    suite: String,
    components: Vec<String>,
    signed_by: Option<String>,
}

impl Source {
    fn line(&self) -> String {
        let options = match &self.signed_by {
            Some(keyring) => format!("[signed-by={keyring}] "),
            None => String::new(),
        };
        format!("deb {options}{} {} {}", self.uri, self.suite, self.components.join(" "))
    }

    /// The distribution's own archive, not a third party's that uses the same suite names.
    fn is_of(&self, suite: &str) -> bool {
        let parts = [suite.to_owned(), format!("{suite}-updates"), format!("{suite}-security")];
        parts.contains(&self.suite) && self.components.iter().any(|component| component == "main")
    }
}

/// The lines for a suite: the host's, or Debian's public mirror where the host has none for it.
#[must_use]
pub fn for_suite(suite: &str) -> Vec<String> {
    for_suite_in(Path::new("/etc/apt"), suite)
}

fn for_suite_in(apt: &Path, suite: &str) -> Vec<String> {
    let mut files = vec![apt.join("sources.list")];
    let more = fs::read_dir(apt.join("sources.list.d")).into_iter().flatten().flatten();
    files.extend(more.map(|entry| entry.path()));
    files.sort();
    let mut lines = Vec::new();
    for path in files {
        // What apt may read and we may not is not for us.
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let sources = match path.extension().and_then(|extension| extension.to_str()) {
            Some("list") => parse_lines(&text),
            Some("sources") => parse_stanzas(&text),
            _ => continue,
        };
        for line in sources.iter().filter(|source| source.is_of(suite)).map(Source::line) {
            if !lines.contains(&line) {
                lines.push(line);
            }
        }
    }
    // Updates alone make no system.
    let has_base = lines.iter().any(|line| line.split(' ').any(|word| word == suite));
    if has_base { lines } else { public_mirror(suite) }
}

fn public_mirror(suite: &str) -> Vec<String> {
    vec![
        format!("deb {DEFAULT_MIRROR} {suite} main"),
        format!("deb {DEFAULT_MIRROR} {suite}-updates main"),
        format!("deb {DEFAULT_SECURITY} {suite}-security main"),
    ]
}

fn parse_lines(text: &str) -> Vec<Source> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Source> {
    let rest = line.split('#').next()?.trim().strip_prefix("deb")?;
    let rest = rest.strip_prefix(|c: char| c.is_whitespace())?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Source {
        uri: words.next()?,
        suite: words.next()?,
        components: words.collect(),
        signed_by: signed_by.map(str::to_owned),
    })
}

fn parse_stanzas(text: &str) -> Vec<Source> {
    let text: String =
        text.lines().filter(|line| !line.starts_with('#')).fold(String::new(), |mut text, line| {
            text.push_str(line);
            text.push('\n');
            text
        });
    text.split("\n\n").flat_map(parse_stanza).collect()
}

fn parse_stanza(stanza: &str) -> Vec<Source> {
    let field = |name: &str| {
        stanza.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.trim().eq_ignore_ascii_case(name).then(|| value.trim())
        })
    };
    let words = |name| field(name).unwrap_or_default().split_whitespace().map(str::to_owned);
    let disabled = field("Enabled").is_some_and(|value| value.eq_ignore_ascii_case("no"));
    if disabled || !words("Types").any(|kind| kind == "deb") {
        return Vec::new();
    }
    let components: Vec<String> = words("Components").collect();
    // A key written out in the stanza itself cannot be put into a line; apt's own keys remain.
    let signed_by = field("Signed-By").filter(|path| path.starts_with('/')).map(str::to_owned);
    let mut sources = Vec::new();
    for uri in words("URIs") {
        for suite in words("Suites") {
            sources.push(Source {
                uri: uri.clone(),
                suite,
                components: components.clone(),
                signed_by: signed_by.clone(),
            });
        }
    }
    sources
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_are_read_and_others_archives_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let apt = directory.path();
        fs::create_dir(apt.join("sources.list.d")).unwrap();
        fs::write(
            apt.join("sources.list"),
            "# deb http://no bookworm main\ndeb-src http://no bookworm main\n\
             deb [arch=amd64 signed-by=/k.gpg] http://mirror/debian bookworm main contrib # x\n\
             deb https://docker bookworm stable\ndeb https://pg bookworm-pgdg main\n",
        )
        .unwrap();
        fs::write(
            apt.join("sources.list.d/debian.sources"),
            "Types: deb deb-src\nURIs: http://sec/debian\n# note\nSuites: bookworm-security trixie\n\
             Components: main\nSigned-By: /s.gpg\n\nTypes: deb\nEnabled: no\nURIs: http://off\n\
             Suites: bookworm\nComponents: main\n",
        )
        .unwrap();
        assert_eq!(
            for_suite_in(apt, "bookworm"),
            [
                "deb [signed-by=/k.gpg] http://mirror/debian bookworm main contrib",
                "deb [signed-by=/s.gpg] http://sec/debian bookworm-security main",
            ]
        );
        assert_eq!(
            for_suite_in(apt, "trixie"),
            ["deb [signed-by=/s.gpg] http://sec/debian trixie main"]
        );
        assert_eq!(for_suite_in(apt, "sid"), public_mirror("sid"));
        assert_eq!(for_suite_in(&apt.join("none"), "sid"), public_mirror("sid"));
    }
}
