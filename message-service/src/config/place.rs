//! Where in a file something is wrong: from the path of a key to its line.

use toml::de::DeTable;

use super::Error;

/// One step from the root of the file towards a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Into a table.
    Key(&'static str),
    /// Into a list; the first is 0.
    Item(usize),
}

/// Something that is wrong, and the path to it.
#[derive(Debug)]
pub(super) struct Wrong {
    pub(super) path: Vec<Place>,
    pub(super) what: String,
}

impl Wrong {
    pub(super) fn new(path: impl Into<Vec<Place>>, what: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            what: what.into(),
        }
    }

    /// The last key of the path.
    pub(super) fn key(&self) -> &'static str {
        let keys = self.path.iter().rev().find_map(|place| match place {
            Place::Key(key) => Some(*key),
            Place::Item(_) => None,
        });
        keys.unwrap_or_default()
    }
}

/// The text that is checked and what it is called.
pub(super) struct Source<'a> {
    name: &'a str,
    text: &'a str,
}

impl<'a> Source<'a> {
    pub(super) fn new(name: &'a str, text: &'a str) -> Self {
        Self { name, text }
    }

    /// What the parser refused: not TOML, an unknown key, a wrong type.
    pub(super) fn syntax(&self, error: &toml::de::Error) -> Error {
        let what = error.message().lines().collect::<Vec<_>>().join("; ");
        let what = what.replace("unknown field", "unknown key");
        self.at(error.span().map(|span| span.start), what)
    }

    /// What the rules refused.
    pub(super) fn invalid(&self, wrong: Wrong) -> Error {
        let at = self.offset(&wrong.path);
        self.at(at, wrong.what)
    }

    fn at(&self, offset: Option<usize>, what: String) -> Error {
        let place = match offset {
            Some(offset) => format!("{}:{}", self.name, self.line(offset)),
            None => self.name.to_owned(),
        };
        Error::Invalid { place, what }
    }

    fn line(&self, offset: usize) -> usize {
        let before = self.text.get(..offset).unwrap_or(self.text);
        before.matches('\n').count() + 1
    }

    /// Goes along the path as far as the file has it, so that a missing key is reported at
    /// its table.
    fn offset(&self, path: &[Place]) -> Option<usize> {
        let root = DeTable::parse(self.text).ok()?.into_inner();
        let Some((Place::Key(first), rest)) = path.split_first() else {
            return None;
        };
        let mut value = root.get(*first)?;
        let mut offset = value.span().start;
        for place in rest {
            let next = match place {
                Place::Key(key) => value.get_ref().get(*key),
                Place::Item(index) => value.get_ref().get(*index),
            };
            let Some(next) = next else { break };
            value = next;
            offset = value.span().start;
        }
        Some(offset)
    }
}
