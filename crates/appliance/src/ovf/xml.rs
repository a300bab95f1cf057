//! XML as a tree, without what descriptions do not need: no document types, no prefixes.

use quick_xml::events::{BytesStart, Event};
use quick_xml::reader::Reader;

use crate::limits::OVF_DEPTH_MAX;
use crate::ovf::OvfError;

/// An element.
#[derive(Debug, Default)]
pub(super) struct Element {
    /// Without a prefix.
    pub(super) name: String,
    attributes: Vec<(String, String)>,
    children: Vec<Element>,
    /// Its own text.
    pub(super) text: String,
}

impl Element {
    /// The value of an attribute.
    pub(super) fn attribute(&self, name: &str) -> Option<&str> {
        let mut all = self.attributes.iter();
        all.find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// Its first child of that name.
    pub(super) fn child(&self, name: &str) -> Option<&Self> {
        self.children.iter().find(|child| child.name == name)
    }

    /// All elements of that name in it, however deep.
    pub(super) fn find<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Self> {
        let mut open: Vec<_> = self.children.iter().rev().collect();
        std::iter::from_fn(move || {
            loop {
                let next = open.pop()?;
                open.extend(next.children.iter().rev());
                if next.name == name {
                    return Some(next);
                }
            }
        })
    }
}

fn failed(error: impl std::fmt::Display) -> OvfError {
    OvfError(format!("it is no XML: {error}"))
}

fn local(name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    name.rsplit(':').next().unwrap_or_default().to_owned()
}

fn begun(start: &BytesStart<'_>) -> Result<Element, OvfError> {
    let mut attributes = Vec::new();
    for attribute in start.attributes() {
        let attribute = attribute.map_err(failed)?;
        let value = attribute.unescape_value().map_err(failed)?.into_owned();
        attributes.push((local(attribute.key.as_ref()), value));
    }
    Ok(Element { name: local(start.name().as_ref()), attributes, ..Element::default() })
}

/// The outermost element of a text, whose length is limited by whoever read it.
pub(super) fn parse(text: &str) -> Result<Element, OvfError> {
    let mut reader = Reader::from_str(text);
    let mut open: Vec<Element> = vec![Element::default()];
    loop {
        let event = reader.read_event().map_err(failed)?;
        match event {
            Event::Start(start) if open.len() > OVF_DEPTH_MAX => {
                let name = local(start.name().as_ref());
                return Err(OvfError(format!("`{name}` is in too many others")));
            }
            Event::Start(start) => open.push(begun(&start)?),
            Event::Empty(start) => {
                let element = begun(&start)?;
                if let Some(parent) = open.last_mut() {
                    parent.children.push(element);
                }
            }
            // The reader compares the names.
            Event::End(_) => {
                let Some(element) = open.pop() else { continue };
                if let Some(parent) = open.last_mut() {
                    parent.children.push(element);
                }
            }
            Event::Text(text) => {
                let text = text.decode().map_err(failed)?;
                if let Some(element) = open.last_mut() {
                    element.text.push_str(&text);
                }
            }
            Event::DocType(_) => return Err(OvfError("it has a document type".to_owned())),
            Event::Eof => break,
            // What is written with `&` is in no text that is read here.
            _ => {}
        }
    }
    let mut outer = match open.len() {
        1 => open.pop().unwrap_or_default(),
        _ => return Err(OvfError("it ends too early".to_owned())),
    };
    match outer.children.len() {
        1 => Ok(outer.children.pop().unwrap_or_default()),
        count => Err(OvfError(format!("it has {count} outermost elements"))),
    }
}
