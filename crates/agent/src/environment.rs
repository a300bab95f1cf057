//! The variables that the host set for everything it or the console starts in this guest.

use std::sync::OnceLock;

static VARIABLES: OnceLock<Vec<(String, String)>> = OnceLock::new();

/// Sets them, once.
pub fn set(variables: Vec<(String, String)>) {
    // A second time does not come.
    let _ = VARIABLES.set(variables);
}

/// All of them.
pub fn variables() -> &'static [(String, String)] {
    VARIABLES.get().map_or(&[], Vec::as_slice)
}

/// The variable in `NAME=VALUE`, in which bytes may be written as `%2F`; `None` if it is none.
pub fn parse(word: &str) -> Option<(String, String)> {
    let (name, value) = word.split_once('=')?;
    let (name, value) = (decode(name)?, decode(value)?);
    let good = !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0');
    good.then_some((name, value))
}

/// A text in which bytes may be written as `%2F`; `None` if that is wrong, or it is no text then.
pub fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                let (high, low) = (digit(rest.next()?)?, digit(rest.next()?)?);
                u8::try_from(high * 16 + low).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_decoded() {
        let is = |word: &str, name: &str, value: &str| {
            assert_eq!(parse(word), Some((name.to_owned(), value.to_owned())), "{word}");
        };
        is("A=b", "A", "b");
        is("A=", "A", "");
        is("A=b=c", "A", "b=c");
        is("A=%20%c3%A9%0a%25", "A", " \u{e9}\n%");
        for bad in ["A", "=b", "A=%", "A=%2", "A=%zz", "A=%ff", "A=%00", "%3d=x"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
