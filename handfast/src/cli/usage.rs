//! What clap says of a wrong call, as one line that repeats no password.

/// The first part of clap's text, which may have several lines.
pub(super) fn line(text: &str) -> String {
    let text = without_passwords(text.strip_prefix("error: ").unwrap_or(text));
    let said: Vec<_> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .filter(|line| !line.is_empty())
        .collect();
    format!("{}; try --help", said.join("; "))
}

/// Clap repeats arguments as they were given. One that contains `://` may carry a password before
/// its `@`, or in the query behind its `?`.
fn without_passwords(text: &str) -> String {
    let Some(begin) = text.find("://").map(|at| at + "://".len()) else {
        return text.to_owned();
    };
    let (before, url) = text.split_at(begin);
    // A password may hold any character, also an `@` of its own, so it ends at the last one: rather
    // too much is hidden than too little.
    let url = match url.rsplit_once('@') {
        Some((_, server)) => format!("…@{server}"),
        None => url.to_owned(),
    };
    let url = match url.split_once('?') {
        Some((server, query)) => {
            // Arguments are repeated in quotes.
            let behind = query.find('\'').map_or("", |end| &query[end..]);
            format!("{server}?…{behind}")
        }
        None => url,
    };
    format!("{before}{url}")
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::super::Cli;
    use super::*;

    fn refused(arguments: &[&str]) -> String {
        let call = ["handfast"].into_iter().chain(arguments.iter().copied());
        line(&Cli::try_parse_from(call).unwrap_err().to_string())
    }

    #[test]
    fn a_wrong_call_is_one_line() {
        for wrong in [
            &["serve", "--lissen", "x"] as &[_],
            &["serve", "--lease-ms", "long"],
            &["servant"],
            &["migrate", "--owner", "fence"],
            &["serve", "--config"],
        ] {
            let line = refused(wrong);
            assert_eq!(line.lines().count(), 1, "{line}");
            assert!(line.ends_with("; try --help"), "{line}");
            assert!(!line.contains("Usage"), "{line}");
        }
    }

    #[test]
    fn a_wrong_call_repeats_the_server_of_a_url_and_not_its_password() {
        for wrong in [
            &["migrate", "postgres://me:secret@db/h"] as &[_],
            &["migrate", "--stoer", "postgres://me:secret@db/h"],
            &["migrate", "--postgres://me:secret@db/h"],
            &["serve", "--lease-ms=postgres://me:s@secret'@db/h"],
            &["serve", "--lease-ms", "postgres://me:secret\nUsage:@db/h"],
            &["postgres://me:secret@db/h?password=secret"],
            &["serve", "postgres://db/h?password=secret"],
        ] {
            let line = refused(wrong);
            assert!(!line.contains("secret"), "{line}");
            assert_eq!(line.lines().count(), 1, "{line}");
        }
        let line = refused(&["migrate", "postgres://me:secret@db/h"]);
        assert!(line.contains("'postgres://…@db/h'"), "{line}");
    }
}
