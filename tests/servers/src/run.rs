//! Runs a small program to its end, bounded.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::{Error, wait};

/// How much of a log an error repeats.
const TAIL_LINES: usize = 25;

/// What it printed, if it ended well within the deadline. Its outputs are files, because a pipe
/// that nobody reads would stop it.
pub(crate) fn to_its_end(command: &mut Command, deadline: Duration) -> Result<String, Error> {
    let name = command.get_program().to_string_lossy().into_owned();
    let file = || tempfile::tempfile().map_err(Error::cannot("make a temporary file"));
    let (output, errors) = (file()?, file()?);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(copy_of(&output)?)
        .stderr(copy_of(&errors)?)
        .spawn()
        .map_err(Error::cannot(format!("run {name}")))?;
    let ended = wait::until(&format!("the end of {name}"), deadline, || {
        child
            .try_wait()
            .map_err(Error::cannot(format!("wait for {name}")))
    });
    let status = match ended {
        Ok(status) => status,
        Err(late) => {
            // Killing fails only if it has ended meanwhile.
            let _ = child.kill();
            let _ = child.wait();
            return Err(late);
        }
    };
    let output = text_of(output).map_err(Error::cannot(format!("read what {name} printed")))?;
    if status.success() {
        return Ok(output);
    }
    let errors = text_of(errors).map_err(Error::cannot(format!("read what {name} printed")))?;
    let said = tail(&format!("{output}{errors}"));
    Err(Error::new(format!("{name} ended with {status}:\n{said}")))
}

/// An error if this child has ended or was never started.
pub(crate) fn still_runs(child: Option<&mut Child>) -> Result<(), Error> {
    let Some(child) = child else {
        return Err(Error::new("it was not started"));
    };
    match child.try_wait() {
        Ok(None) => Ok(()),
        Ok(Some(status)) => Err(Error::new(format!("it ended with {status}"))),
        Err(error) => Err(Error::cannot("wait for it")(error)),
    }
}

/// The last lines of a text.
pub(crate) fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

fn copy_of(file: &File) -> Result<Stdio, Error> {
    let copy = file
        .try_clone()
        .map_err(Error::cannot("share a temporary file"))?;
    Ok(Stdio::from(copy))
}

fn text_of(mut file: File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
