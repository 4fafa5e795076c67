//! The median of several rounds, with the least and the most.

use serde_json::{Value, json};

/// Figures of the rounds that count.
#[derive(Clone, Debug, Default)]
pub(crate) struct Figures(Vec<f64>);

impl Figures {
    /// One more round.
    pub(crate) fn add(&mut self, figure: f64) {
        self.0.push(figure);
    }

    /// The one in the middle, or the mean of the two; 0 without any.
    pub(crate) fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => 0.0,
            n if n % 2 == 1 => sorted[middle],
            _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
        }
    }

    fn least(&self) -> f64 {
        self.0.iter().copied().fold(f64::INFINITY, f64::min)
    }

    fn most(&self) -> f64 {
        self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }

    /// For programs; null without any.
    pub(crate) fn json(&self) -> Value {
        if self.0.is_empty() {
            return Value::Null;
        }
        json!({ "median": self.median(), "min": self.least(), "max": self.most(), "rounds": self.0 })
    }

    /// For people, with so many digits behind the point.
    pub(crate) fn row(&self, name: &str, digits: usize) -> String {
        if self.0.is_empty() {
            return format!("{name:<28} {:>12} {:>12} {:>12}", "-", "-", "-");
        }
        format!(
            "{name:<28} {:>12.digits$} {:>12.digits$} {:>12.digits$}",
            self.median(),
            self.least(),
            self.most()
        )
    }
}

/// What stands above the rows.
pub(crate) fn head(title: &str) -> String {
    format!("{title:<28} {:>12} {:>12} {:>12}", "median", "min", "max")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let of = |figures: &[f64]| Figures(figures.to_vec()).median();
        assert_eq!(of(&[]), 0.0);
        assert_eq!(of(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(of(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn what_was_not_measured_is_no_figure() {
        let none = Figures::default();
        assert_eq!(none.json(), Value::Null);
        assert_eq!(none.row("bytes", 0).matches(" -").count(), 3);
    }
}
