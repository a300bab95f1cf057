//! What a guest printed, as data.

/// One line of a guest's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// The check passed.
    Ok(String),
    /// The check failed; the second part says what was found and expected.
    Fail(String, String),
    /// The check could not be made; the name is followed by the reason in brackets.
    Skip(String),
}

/// The output of one run of a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The checks in the order they were made.
    pub lines: Vec<Line>,
    /// Whether the guest came to its last line.
    pub done: bool,
}

impl Report {
    /// Reads a guest's serial output. Lines of other forms (firmware, boot loaders) are passed over.
    #[must_use]
    pub fn parse(output: &str) -> Self {
        let mut report = Self::default();
        for line in output.lines() {
            let line = line.trim_end();
            if let Some(name) = line.strip_prefix("ok ") {
                report.lines.push(Line::Ok(name.into()));
            } else if let Some(rest) = line.strip_prefix("FAIL ") {
                let (name, detail) = split_detail(rest);
                report.lines.push(Line::Fail(name.into(), detail.into()));
            } else if let Some(rest) = line.strip_prefix("skip ") {
                report.lines.push(Line::Skip(rest.into()));
            } else if line.starts_with("done: ") {
                report.done = true;
            }
        }
        report
    }

    /// Names and details of the failed checks.
    pub fn failures(&self) -> impl Iterator<Item = (&str, &str)> {
        self.lines.iter().filter_map(|line| match line {
            Line::Fail(name, detail) => Some((name.as_str(), detail.as_str())),
            Line::Ok(_) | Line::Skip(_) => None,
        })
    }
}

/// Splits `NAME: [what ]got X want Y` before the part that the runtime added.
fn split_detail(rest: &str) -> (&str, &str) {
    for mark in [": got ", ": vector got ", ": error code got ", ": rip got ", ": vector "] {
        if let Some(at) = rest.rfind(mark) {
            let (name, detail) = rest.split_at(at);
            return (name, detail.get(2..).unwrap_or(""));
        }
    }
    (rest, "")
}

#[cfg(test)]
mod tests {
    use super::{Line, Report};

    #[test]
    fn reads_all_forms() {
        let report = Report::parse(
            "SeaBIOS\nok a: b\r\nFAIL c: d: error code got 1 want 2\nskip e (not there)\n\
             done: 1 ok, 1 failed\n",
        );
        assert_eq!(
            report.lines,
            [
                Line::Ok("a: b".into()),
                Line::Fail("c: d".into(), "error code got 1 want 2".into()),
                Line::Skip("e (not there)".into()),
            ]
        );
        assert!(report.done);
        assert_eq!(report.failures().count(), 1);
    }

    #[test]
    fn a_guest_that_stops_early_is_not_done() {
        assert!(!Report::parse("ok a\n").done);
    }
}
