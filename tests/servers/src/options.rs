//! What a server is told beyond its defaults.

use std::path::{Path, PathBuf};

/// Where a server lives, and settings of its own.
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub(crate) within: Option<PathBuf>,
    pub(crate) settings: Vec<(String, String)>,
}

impl Options {
    /// The system's temporary folder, and no further setting.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Lives in a folder within this one, for example a small file system that can be filled.
    #[must_use]
    pub fn within(mut self, parent: impl AsRef<Path>) -> Self {
        self.within = Some(parent.as_ref().to_owned());
        self
    }

    /// Adds lines to `postgresql.conf` or `rabbitmq.conf`; they win over the defaults here.
    #[must_use]
    pub fn with_settings(mut self, settings: &[(&str, &str)]) -> Self {
        let owned = |&(key, value): &(&str, &str)| (key.to_owned(), value.to_owned());
        self.settings.extend(settings.iter().map(owned));
        self
    }
}
